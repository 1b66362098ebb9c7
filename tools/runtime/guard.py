"""Runs ComfyUI's main.py, and ends with the process that started it, even when that one was killed.

The starter holds the other end of standard input and never writes to it, so reading returns only when it is gone.
"""

import os
import runpy
import sys
import threading


def _end_with_starter() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_starter, daemon=True).start()
    del sys.argv[0]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
