"""What run.py uses: set-up, a real ComfyUI server as a child process, and the demo job. The nodes never import this."""


class RunError(Exception):
    """Its text is what the user reads: what went wrong and what to do about it."""
