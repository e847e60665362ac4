"""Regions of a sample: boxes that move with its picture, the tokens in them, and what each says."""
