"""Objective = head + loss + the batch fields it needs. Start at base.py."""
