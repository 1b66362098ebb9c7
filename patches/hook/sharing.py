"""One map for many rows: whose q and k every row uses, and attention with values side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...methods import attention as maths
from .call import AttentionCall
from .requests import MapSource, ShareMap
from .tensors import CallTensors, Kernel, index_or_slice, persistent


@dataclass(frozen=True)
class SharedMaps:
    """Whose q and k every row of a call uses, after all of its `ShareMap` requests.

    Attributes:
        rows: numbers as in `MapSource.rows`.
        own: the rows of the batch that the call's q and k are of; the rest were not computed.
        kept: q and k from earlier forwards, numbered on from the batch.
        answers: what the requests said.
    """

    rows: list[int]
    own: list[int]
    kept: tuple[tuple[Tensor, Tensor], ...]
    answers: tuple[MapSource, ...]

    @classmethod
    def of(cls, call: AttentionCall, requests: Sequence[ShareMap]) -> SharedMaps | None:
        """Ask the requests of a call; None where there are none."""
        rows, kept, answers = list(range(call.batch)), [], []
        total = call.batch
        for request in requests:
            answer = request.source(call)
            if not isinstance(answer, MapSource):
                answer = MapSource(answer.tolist() if isinstance(answer, Tensor) else answer)
            rows = [rows[s] if s < call.batch else s - call.batch + total for s in answer.rows]
            if answer.kept is not None:
                kept.append(answer.kept)
                total += len(answer.kept[0])
            answers.append(answer)
        return cls(rows, list(range(call.batch)), tuple(kept), tuple(answers)) if answers else None

    @cached_property
    def needed(self) -> list[int]:
        """The rows of the batch whose own q and k somebody uses."""
        asked = {row for answer in self.answers for row in answer.keep}
        return sorted(asked | {s for s in self.rows if s < len(self.rows)})

    @cached_property
    def mask_rows(self) -> Tensor:
        """The row whose mask each row takes: the mask's rows are the batch's; with a map from another forward, the row's own."""
        return torch.tensor([s if s < len(self.rows) else row for row, s in enumerate(self.rows)])

    def gather(self, tensors: CallTensors) -> tuple[Tensor, Tensor, list[int]]:
        """All q and k that there are, and each row's place among them; listeners get what they asked for."""
        place = {row: i for i, row in enumerate(self.own)}
        q, k = tensors.q, tensors.k
        for answer in self.answers:
            if answer.listener is not None:
                which = index_or_slice([place[row] for row in answer.keep], q.device)
                with persistent():
                    answer.listener(q[which].clone(), k[which].clone())
        if self.kept:
            q, k = (torch.cat([own, *more]) for own, more in zip((q, k), zip(*self.kept, strict=True), strict=True))
        batch = len(self.rows)
        return q, k, [place[s] if s < batch else len(self.own) + s - batch for s in self.rows]

    def attend(self, tensors: CallTensors, q: Tensor, k: Tensor, places: list[int], kernel: Kernel) -> Tensor:
        """Rows that use the same map attend once, with their values side by side; rows with a map to themselves all at once.

        Args:
            q, k: all that there are ``[G, H, M or N, d]``.
            places: each row's among them.
        """
        device = q.device
        if kernel.block_replaced:  # its owner expects every row
            which = index_or_slice(places, device)
            return tensors.open(kernel.whole(tensors.join(q[which]), tensors.join(k[which]), tensors.given[2]))
        groups: dict[int, list[int]] = {}
        for row, place in enumerate(places):
            groups.setdefault(place, []).append(row)
        alone = [rows[0] for rows in groups.values() if len(rows) == 1 and self.rows[rows[0]] == rows[0]]
        if tensors.settings.get("mask") is not None:
            alone = []
        order, parts = [*alone], []
        if alone:
            here, rows = index_or_slice([places[row] for row in alone], device), index_or_slice(alone, device)
            given = tensors.given
            parts.append(tensors.open(kernel.whole(given[0][here], given[1][here], given[2][rows])))
        for place, members in groups.items():
            if members[0] in alone:
                continue
            one = slice(place, place + 1)
            mask = tensors.mask(self.mask_rows[members[:1]], slice(None))
            parts.append(maths.shared(q[one], k[one], tensors.v[index_or_slice(members, device)], tensors.scale, mask))
            order += members
        out = torch.cat(parts) if len(parts) > 1 else parts[0]
        back = [0] * len(order)
        for i, row in enumerate(order):
            back[row] = i
        return out[index_or_slice(back, device)]
