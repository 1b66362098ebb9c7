"""Training of the bundled model of stickers: sources, renderer, and a stage per network."""
