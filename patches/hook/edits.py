"""The needed part of a call's map, computed once, passed through the edits and shown to the readers.

An edit of few columns is a low-rank correction of the fast kernel's output (see `methods.attention.replace_columns`). Which rows and
columns is worked out in plain numbers, which never wait for the device, and most are neighbours: a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ...methods import attention as maths
from .call import AttentionCall
from .requests import IMAGE, TEXT, EditWeights, ReadWeights, WeightsRequest
from .tensors import CallTensors, index_or_slice, persistent, put

QueriesAndKeys: TypeAlias = tuple[Tensor, Tensor, Tensor | None]


class WeightsOfCall:
    """Attention weights of one call, as far as requests look at them.

    Args:
        qk: q and k of every row, ``[B, H, M or N, d]``, where rows share a map those that they use; and what each row's exponentials sum to,
            if the kernel has told (`methods.attention.attend`).
        mask_rows: the row whose mask each row takes, where rows share a map.
        queries: the tokens that look, of whose weights everything here is.
    """

    def __init__(self, call: AttentionCall, tensors: CallTensors, qk: QueriesAndKeys, mask_rows: Tensor | None, queries: slice):
        self.call, self.tensors, self.mask_rows, self.queries = call, tensors, mask_rows, queries
        self.q, self.k, self.total = qk
        self.offset = call.text.start if call.kind != "self" else 0
        self.count = (call.text.stop - call.text.start) if call.kind != "self" else self.k.shape[2]
        # Edited rows, and the columns that are looked at: their places in the tensors that follow.
        self.edited_rows: dict[int, int] = {}
        self.edited_columns: dict[int, int] = {}
        self.before = self.after = self.rest = torch.empty(0)

    def of_call(self, request: WeightsRequest) -> bool:
        """Whether a request has anything to do here: its rows are in the batch, the prompt is its own, and maps are of the picture."""
        own = request.prompt_columns is None or self.count % request.prompt_columns == 0
        if isinstance(request, ReadWeights):
            own = own and not self.call.tokens.regrouped
        return own and self.call.rows(request.rows) != []

    def _rows(self, request: WeightsRequest) -> Sequence[int]:
        rows = self.call.rows(request.rows)
        return range(self.call.batch)[rows] if isinstance(rows, slice) else rows

    def _columns(self, request: WeightsRequest) -> Sequence[int]:
        """Keys of a request's columns; of a repeated prompt, all columns of its first copy before those of its second."""
        call, own = self.call, request.prompt_columns or self.count
        if isinstance(request.columns, str):
            return range(call.image.start, call.image.stop)
        if request.columns is None:
            return range(self.offset, self.offset + self.count)
        if request.columns and max(request.columns) >= own:
            raise ValueError(
                f"text column {max(request.columns)} does not exist at {call.site.name}: the prompt has {self.count} columns"
            )
        return [self.offset + copy + c for copy in range(0, self.count, own) for c in request.columns]

    def _folded(self, weights: Tensor, request: WeightsRequest) -> Tensor:
        """Weights of the prompt's columns ``[..., T]``: the sum over the copies of each, where it is there more than once."""
        own = request.prompt_columns
        if own is None or own == self.count or isinstance(request.columns, str):
            return weights
        return weights.unflatten(-1, (self.count // own, -1)).sum(dim=-2)

    def _weights(
        self, rows: Sequence[int], columns: Sequence[int], heads: Any = slice(None), mean_heads: bool = False
    ) -> Tensor:
        device = self.q.device
        which = index_or_slice(rows, device)
        if self.total is not None and len(columns) <= self.k.shape[2] // 2:
            k = self.k[which][:, heads][:, :, index_or_slice(columns, device)]
            q, total = self.q[which][:, heads, self.queries], self.total[which][:, heads, self.queries]
            found = maths.of_columns(q, k, total, self.tensors.scale)
            return found.mean(dim=1) if mean_heads else found
        mask_rows = which if self.mask_rows is None else self.mask_rows.to(device)[which]
        mask = self.tensors.mask(mask_rows, self.queries)
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, heads]
        return maths.probabilities(
            self.q[which][:, heads, self.queries],
            self.k[which][:, heads],
            columns=index_or_slice(columns, device),
            scale=self.tensors.scale,
            mask=mask,
            mean_heads=mean_heads,
        )

    def edit(self, edits: Sequence[EditWeights], shown: Sequence[ReadWeights], out: Tensor, block_replaced: bool) -> Tensor:
        """Carry out the edits in order: ``out [B, H, M, d]`` corrected. Columns that are ``shown`` afterwards are kept up to date."""
        if not edits:
            return out
        device = out.device
        self.edited_rows = {row: i for i, row in enumerate(sorted({row for r in edits for row in self._rows(r)}))}
        looked_at: list[WeightsRequest] = [*edits, *(r for r in shown if r.columns is not None)]
        self.edited_columns = {c: i for i, c in enumerate(sorted({c for r in looked_at for c in self._columns(r)}))}
        self.before = self.after = self._weights(list(self.edited_rows), list(self.edited_columns))
        self.rest = torch.ones_like(self.before[..., :1])
        changes = [self._edit(request) for request in edits]
        if not any(changes):
            return out
        which = index_or_slice(list(self.edited_rows), device)
        v = self.tensors.v[which][:, :, index_or_slice(list(self.edited_columns), device)]
        given = out[which][:, :, self.queries]
        if block_replaced:  # only the text's share changes
            q = self.q[which][:, :, self.queries]
            text = F.scaled_dot_product_attention(q, self.k[which], self.tensors.v[which], scale=self.tensors.scale)
            fixed = given + maths.replace_columns(text, v, self.before, self.after, self.rest) - text
        else:
            fixed = maths.replace_columns(given, v, self.before, self.after, self.rest)
        if out.requires_grad or fixed.requires_grad:
            out = out.clone()
        out[which, :, self.queries] = fixed
        return out

    def _edit(self, request: EditWeights) -> bool:
        """One edit of the weights so far; whether it changes anything."""
        device = self.after.device
        rows = index_or_slice([self.edited_rows[row] for row in self._rows(request)], device)
        places = index_or_slice([self.edited_columns[c] for c in self._columns(request)], device)
        given = self.after[rows][..., places]
        folded = self._folded(given, request)
        with persistent():
            edited = request.edit(self.call, folded)
        if edited is None:
            return False
        if self.call.run is not None:
            self.call.run.acted.add(request.effect)
        new, factor = edited
        copies = given.shape[-1] // folded.shape[-1]
        if copies > 1:  # each takes its part of the change
            new = given + ((new - folded) / copies).repeat(1, 1, 1, copies)
        heads = request.where[self.call.site.name, self.call.kind]
        if heads is not None:  # the other heads stay
            keep = torch.ones(self.tensors.heads, dtype=torch.bool, device=device)
            keep[list(heads)] = False
            new = torch.where(keep[:, None, None], given, new)
            factor = None if factor is None else torch.where(keep[:, None, None], torch.ones_like(factor), factor)
        if factor is not None:
            self.rest = put(self.rest, 0, rows, self.rest[rows] * factor)
        if not isinstance(places, slice) or places != slice(0, len(self.edited_columns)):
            others = self.after[rows] if factor is None else self.after[rows] * factor
            new = put(others, 3, places, new)
        self.after = put(self.after, 0, rows, new)
        return True

    def read(self, request: ReadWeights) -> None:
        """Show a request the weights that it asks for, after the edits."""
        asked = request.where[self.call.site.name, self.call.kind]
        heads = slice(None) if asked is None else list(asked)
        rows, columns, edited = self._rows(request), self._columns(request), bool(self.edited_rows)
        part = self._weights(rows, columns, heads, request.mean_heads and not edited)
        if edited:
            part = self._as_edited(part, rows, columns, heads)
            part = part.mean(dim=1) if request.mean_heads else part
        request.read(self.call, self._folded(part, request))

    def _as_edited(self, part: Tensor, rows: Sequence[int], columns: Sequence[int], heads: Any) -> Tensor:
        """Weights ``[R, h, M, T]`` of some rows and columns after the edits."""
        places, union = self.edited_rows, self.edited_columns
        here = index_or_slice([i for i, row in enumerate(rows) if row in places], part.device)
        there = index_or_slice([places[row] for row in rows if row in places], part.device)
        inside = index_or_slice([i for i, c in enumerate(columns) if c in union], part.device)
        edited = index_or_slice([union[c] for c in columns if c in union], part.device)
        changed = part[here] * self.rest[there][:, heads]
        changed = put(changed, 3, inside, self.after[there][:, heads][..., edited])
        return put(part, 0, here, changed)


def edit_and_read(
    call: AttentionCall,
    requests: tuple[Sequence[EditWeights], Sequence[ReadWeights]],
    tensors: CallTensors,
    qk: QueriesAndKeys,
    out: Tensor,
    mask_rows: Tensor | None = None,
    block_replaced: bool = False,
) -> Tensor:
    """Carry out a call's edits and readings, in this order; returns ``out [B, H, M, d]`` corrected for the edits."""
    weights = WeightsOfCall(call, tensors, qk, mask_rows, call.image)
    edits = [r for r in requests[0] if weights.of_call(r)]
    reads = [r for r in requests[1] if weights.of_call(r)]
    out = weights.edit([r for r in edits if r.tokens == IMAGE], reads, out, block_replaced)
    if of_text := [r for r in edits if r.tokens == TEXT]:
        out = WeightsOfCall(call, tensors, qk, mask_rows, call.text).edit(of_text, (), out, block_replaced)
    for request in reads:
        with persistent():
            weights.read(request)
    return out
