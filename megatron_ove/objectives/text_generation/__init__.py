"""Text generation: a causal decoder writes down what the encoder's tokens show."""
