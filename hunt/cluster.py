"""A search on many machines with Ray (an optional extra): workers hold the model, this process holds the log.

Batches are Ray tasks. Ray gives the work of a worker that died to another one, and work that waits to a machine that joins; a worker
process builds what it needs once and keeps it. What travels is a recipe and numbers, never a model.
"""

from __future__ import annotations

import importlib
import ipaddress
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management

from .batches import Batch
from .log import Evaluation

PACK = Path(__file__).resolve().parent.parent
LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: Ray takes the loopback address for its own
RETRIES = 20  # of a batch whose worker dies: a batch that kills every worker must come to an end
_held: dict[str, Any] = {}  # in a worker: the engine of each recipe


def evaluate(builder: str, recipe: str, batch: Batch) -> list[Evaluation]:
    """In a worker: carry out a batch, with an engine that is built at the first one.

    Args:
        builder: ``module:function`` that makes an engine from the recipe (JSON).
    """
    if recipe not in _held:
        _held.clear()
        module, name = builder.split(":")
        _held[recipe] = getattr(importlib.import_module(module), name)(json.loads(recipe))
    return _held[recipe].evaluate(*batch)


def _load_pack(pack: str, comfyui: str) -> None:
    """In a worker: what `evaluate` needs to be imported. Another machine may have it elsewhere and say so in its environment."""
    import importlib.util
    import os
    import sys
    from pathlib import Path

    if "attune" in sys.modules:
        return
    root = Path(os.environ.get("ATTUNE_PATH") or pack)
    spec = importlib.util.spec_from_file_location("attune_bootstrap", root / "tools" / "runtime" / "bootstrap.py")
    if spec is None or spec.loader is None or not root.is_dir():
        raise RuntimeError(f"Attune is not in {root} on this machine; set ATTUNE_PATH and COMFYUI_PATH before “ray start”")
    bootstrap = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bootstrap)
    bootstrap.load(Path(os.environ.get("COMFYUI_PATH") or comfyui))


class Cluster:
    """Ray at an address: ``local`` starts one here, ``auto`` finds the one that runs here, else ``host:port`` or ``ray://…``.

    One that is started here listens on this machine only, with tokens where this Ray has them.

    Raises:
        ValueError: when Ray is not installed, or there is no cluster at that address.
    """

    def __init__(self, address: str, builder: str, recipe: Mapping[str, Any], cpus: float = 1, gpus: float | None = None):
        if address == "local":
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ[LOOPBACK] = "0"  # read when Ray is imported; on every system, in spite of its name
        try:
            import ray
        except ImportError:
            raise ValueError(
                "A search on several machines needs Ray: install it with ComfyUI's Python (pip install ray), or leave its address out."
            ) from None
        self.ray = ray
        self.own = not ray.is_initialized()
        if self.own:
            try:
                ray.init(address, include_dashboard=False, log_to_driver=False, configure_logging=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"there is no Ray cluster at “{address}” ({error}); start one with “ray start --head”."
                ) from None
            if address == "local" and not ipaddress.ip_address(host := ray.util.get_node_ip_address()).is_loopback:
                ray.shutdown()
                raise ValueError(
                    f"Ray would listen on {host}, where others can reach it. Run the search in a process that has not imported Ray "
                    "before, or start Ray yourself (“ray start --head”) and give its address."
                )
        import folder_paths

        each = float("GPU" in ray.cluster_resources()) if gpus is None else gpus
        self.recipe, self.builder = json.dumps(recipe, sort_keys=True), builder
        pack, comfyui = str(PACK), folder_paths.base_path
        # A function inside a function: Ray sends these by value, and a worker can run them before it has the pack.
        source = _load_pack

        def work(builder: str, recipe: str, batch: Any) -> Any:
            load(pack, comfyui)
            from attune.hunt.cluster import evaluate  # type: ignore[import-not-found]

            return evaluate(builder, recipe, batch)

        load = _by_value(source)
        self.work = ray.remote(num_cpus=cpus, num_gpus=each, max_retries=RETRIES, max_calls=0)(work)

    def __call__(self, batches: Sequence[Batch]) -> Iterator[list[Evaluation]]:
        """Carry out batches anywhere, in any order; what is not finished when nobody waits for it any more is dropped."""
        waiting = [self.work.remote(self.builder, self.recipe, batch) for batch in batches]
        try:
            while waiting:
                ready, waiting = self.ray.wait(waiting, num_returns=1, timeout=1)
                comfy.model_management.throw_exception_if_processing_interrupted()
                for reference in ready:
                    try:
                        rows = self.ray.get(reference)
                    except self.ray.exceptions.RayTaskError as error:
                        raise error.cause if isinstance(error.cause, ValueError) else error from None
                    yield rows
        finally:
            for reference in waiting:
                self.ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self.own:
            self.ray.shutdown()


def _by_value(function: Any) -> Any:
    """A copy of a module's function that is pickled whole, since a worker cannot import its module yet."""
    import types

    copy = types.FunctionType(function.__code__, {"__builtins__": __builtins__}, function.__name__)
    copy.__module__ = "__main__"
    return copy
