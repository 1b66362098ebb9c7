"""Attention maps of a run: recorded, read back, and shown."""
