"""Measurements: scripts that print ratios to the plain run, never timed tests. ``python3 run.py bench <name>``."""
