"""Scorers of pictures, and the scores made with them."""
