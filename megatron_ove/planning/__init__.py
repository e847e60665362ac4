"""Arithmetic on configurations: what a run will need, before anything is bought or allocated."""
