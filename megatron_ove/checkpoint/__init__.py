"""Saving and loading sharded state dicts; knows no model class."""
