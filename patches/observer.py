"""Who looks on while a method works. A node in the editor is told and shown things; used from Python, only the log is."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor


class Observer:
    """Nobody: what is said goes to the log, and nothing is shown. `server.previews.Preview` is a node of the editor.

    Methods ask `watching` before they gather anything to show.
    """

    def watching(self) -> bool:
        """Whether anybody wants to see maps now."""
        return False

    def tell(self, text: str) -> None:
        """A sentence about the run."""
        logging.info("Attune: %s", text)

    def effect(self, missing: str | None) -> None:
        """Why a run is, or was, not changed, in a sentence without its end; None where it was."""
        if missing is not None:
            logging.info("Attune: no effect: %s", missing)

    def origin(self) -> Any:
        """What makes a picture now: the same for the same picture of the same workflow."""
        return None

    def prompt_text(self) -> str | None:
        """The text of the positive prompt that is sampled now, where a workflow tells."""
        return None

    def layer(self, call: Any, weights: Tensor, names: Sequence[str] | None = None) -> None:
        """One layer's attention in an `AttentionCall`, of the first picture: ``[M, N]`` or ``[heads, M, N]``.

        Args:
            names: of the columns; None: they are all of a prompt's columns.
        """

    def regions(self, step: int | None, steps: int | None, owner: Tensor, columns: int) -> None:
        """Who owns each pixel of the first picture: ``owner [h, w]``, the text column from 1 of ``columns``; 0 is nobody."""

    def masks(self, step: int | None, steps: int | None, names: Sequence[str], masks: Tensor, last: bool = False) -> None:
        """Masks ``[n, h, w]`` from 0 to 1, or boolean; ``last``: there will be no more."""


NOBODY = Observer()
