"""The bundled model: a small text-to-image diffusion model of a world of shapes, and the tools that made it."""
