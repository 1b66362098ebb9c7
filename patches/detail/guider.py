"""ComfyUI's guider for the branches of a picture: all at once, or in parts where memory is short."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..hook.install import ModelPatcher
from .branches import BRANCHES, ReadPlan, chosen_rows, rows_of
from .session import Area, Session


class Guider(comfy.samplers.CFGGuider):
    """KSampler's guider; branches that do not fit in memory together are evaluated in parts, the base's first."""

    def __init__(self, model: ModelPatcher, session: Session):
        super().__init__(model)
        self.session = session
        self.size = session.settings.branches_at_once
        self.parts: dict[tuple[str, range], list[dict[str, Any]]] = {}
        self.following = False

    def prompts(self, plans: list[ReadPlan]) -> dict[Any, ReadPlan]:
        """The plans of the merged conditionings, in order, by the name that ComfyUI gave each."""
        positive = (cond for cond in self.original_conds["positive"] if BRANCHES in cond)
        return {cond["uuid"]: plan for cond, plan in zip(positive, plans, strict=True)}

    @property
    def areas(self) -> dict[Any, Area | None]:
        """Where in the latent each positive conditioning is, by its name; None: everywhere."""
        return {cond["uuid"]: cond.get("area") for cond in self.conds["positive"]}

    def follow_base(self) -> None:
        """From here on the last branch has the base's prompt, which knows every detail."""
        if self.following:
            return
        self.following = True
        self.parts.clear()
        n, total = self.session.pictures, self.session.pictures * self.session.total
        rows = torch.tensor([*range(total - n), *range(n)])
        known: dict[str, list[dict[str, Any]]] = self.__dict__["conds"]
        self.conds = {**known, "positive": [{**c, "model_conds": chosen_rows(c, total, rows)} for c in known["positive"]]}

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        session = self.session
        if not self.size:  # once a run, so that all of its steps are computed alike
            self.size = self._fitting(x)
        model_options = {} if model_options is None else model_options
        if self.size >= session.total:
            return super().predict_noise(x, timestep, model_options, seed)
        out = []
        for start in range(0, session.total, self.size):
            session.now = range(start, min(start + self.size, session.total))
            rows = slice(session.now.start * session.pictures, session.now.stop * session.pictures)
            negative, positive = (self._part(role, x.shape[0], rows) for role in ("negative", "positive"))
            out.append(
                comfy.samplers.sampling_function(
                    self.inner_model,
                    x[rows],
                    timestep[rows],
                    negative,
                    positive,
                    self.cfg,
                    model_options=model_options,
                    seed=seed,
                )
            )
        session.end_forward()
        return torch.cat(out)

    def _fitting(self, x: Tensor) -> int:
        """How many branches fit in memory at once, by ComfyUI's own estimate; it runs cond and uncond one by one where it must."""
        free = comfy.model_management.get_free_memory(x.device)
        session = self.session
        for size in range(session.total, 1, -1):
            if self.inner_model.memory_required([size * session.pictures, *x.shape[1:]]) * 1.5 < free:
                return size
        return 1

    def _part(self, role: str, total: int, rows: slice) -> list[dict[str, Any]]:
        """A role's conditionings for some rows, under names of their own: methods that keep state by name keep one for each part."""
        key = (role, range(rows.start, rows.stop))
        if key not in self.parts:
            self.parts[key] = [rows_of(cond, total, rows, part=rows.start) for cond in self.conds[role]]
        return self.parts[key]
