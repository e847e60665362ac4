"""Pages as word tags: recognition, line filters, word segmentation, vocabulary, and the 100-tags-a-page rule."""
