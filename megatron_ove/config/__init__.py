"""Pure data: the configuration, its loader and its error report. Never imports torch."""
