"""Trains the bundled models, their readers and scorers; not part of the installed pack."""
