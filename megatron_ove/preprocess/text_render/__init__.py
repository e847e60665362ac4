"""Pages rendered from real texts in several languages, with the exact box of every line, word and glyph."""
