"""Detail++ on ComfyUI models."""
