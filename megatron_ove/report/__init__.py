"""Pictures and the run's HTML page."""
