"""Machines that try to break the nodes: hostile inputs, and stacks with each other and with ComfyUI's own patches."""
