"""The bundled models as real ComfyUI objects, their worlds, and the networks that read and score their pictures."""
