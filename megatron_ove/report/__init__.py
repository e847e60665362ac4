"""Pictures and the run's HTML page: one self-contained file, no external resource."""
