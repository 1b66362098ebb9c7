"""Makes this repository importable as the package ``attune``, whatever its folder is called, with ComfyUI beside it.

As a script it runs one module of the pack: ``python bootstrap.py COMFYUI_FOLDER MODULE [ARGUMENTS]``.
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(comfyui: Path | None, nodes: bool = True) -> ModuleType:
    """Put ComfyUI on the import path and return the pack as ``attune``. Call it once, before any other import of either.

    Without ``comfyui`` there is the mathematics (`attune.methods`) and what else does not import ComfyUI. Without ``nodes`` the pack's
    own start-up is skipped, and with it the slow import of torch: `attune.tools.runtime` needs neither.
    """
    if comfyui:
        sys.path.insert(0, str(comfyui))
    spec = importlib.util.spec_from_file_location("attune", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules["attune"] = package
    if nodes:
        if comfyui:
            from comfy.cli_args import args

            # Without this, ComfyUI looks for a CUDA device as soon as comfy.model_management is imported.
            args.cpu = args.cpu or not has_accelerator()
        spec.loader.exec_module(package)
    return package


def has_accelerator() -> bool:
    """Whether ComfyUI has something faster than the CPU here; if not, it must be told so."""
    import torch

    backends = (torch.cuda, torch.backends.mps, getattr(torch, "xpu", None))
    return any(backend is not None and backend.is_available() for backend in backends)


def _stop(number: int, frame: object) -> None:
    """Leave by unwinding, so that what was started is stopped; what a half-made event loop says on its way out is no news."""
    sys.unraisablehook = lambda _: None
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(143)


def main(comfyui: str, module: str, arguments: list[str]) -> int:
    """Run ``attune.<module>``'s ``main``; what the user did or met is told in a sentence, without a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    load(Path(comfyui), nodes=not module.startswith("tools.runtime."))
    from attune.tools.runtime import RunError  # the pack has this name from here on

    try:
        return importlib.import_module(f"attune.{module}").main(arguments) or 0
    except RunError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    del sys.path[0]  # this folder: its module names must not hide ComfyUI's
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
