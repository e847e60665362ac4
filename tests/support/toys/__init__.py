"""Kinds as somebody outside would add them: each a module that a configuration names under `plugins`."""
