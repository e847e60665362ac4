"""Reconstruction of a frozen teacher's features, or of pixels, from the encoder's tokens."""
