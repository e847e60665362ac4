"""Shard sets, the stateless sample order, DALI pipelines, delivery of microbatches."""
