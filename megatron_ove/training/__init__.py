"""The loop. Start at trainer.py."""
