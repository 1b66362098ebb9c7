"""Reads the grammar of a prompt: things, details, and which detail belongs to which thing."""
