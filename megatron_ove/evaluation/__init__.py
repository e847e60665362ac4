"""What a trained encoder can do: retrieval figures on shard sets."""
