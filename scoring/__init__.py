"""Scorers of pictures, the folders that their models come from, and the scores made with them."""
