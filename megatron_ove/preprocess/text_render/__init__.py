"""Pictures of text with exact ground truth: typefaces, ink, looks, words, lines and pages (docs/page_maker.md)."""
