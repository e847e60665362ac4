"""Input for the quick start, made without a network: crops of real photographs, pages of real texts, moving scenes."""
