"""The wiring: the only place that knows ComfyUI's internals."""
