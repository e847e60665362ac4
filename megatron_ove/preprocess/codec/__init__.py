"""Clips as sparse patches: motion and residual energy of a re-encoded chain decide which patches are kept."""
