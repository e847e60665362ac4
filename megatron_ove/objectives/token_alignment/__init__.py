"""Token alignment: pixels that show a token carry its embedding, so that text can be pointed at."""
