"""What becomes of a shard set: one file a kind of source."""
