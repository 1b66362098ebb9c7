"""Head filter: of the layers named, only the chosen heads speak. What the others say instead is one of three ablations.

- ``zero``: nothing.
- ``mean``: their own output averaged over the picture. What the head adds everywhere stays, where it adds it is lost. (Not the chosen heads'
  mean: a head's output is in coordinates of its own, which another head's part of the output projection would misread.)
- ``uniform attention``: what the head would say if it looked at everything alike: the mean of its values.

Shapes: ``R`` rows, ``h`` silenced heads, ``M`` pixels, ``N`` keys, ``d`` head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

ZERO, MEAN, UNIFORM = "zero", "mean", "uniform attention"
OTHERS = (ZERO, MEAN, UNIFORM)


def silence(out: Tensor, value: Tensor, others: str) -> Tensor:
    """What silenced heads say.

    Args:
        out: their output ``[R, h, M, d]``.
        value: their values ``[R, h, N, d]``.
        others: one of `OTHERS`.

    Returns:
        ``[R, h, M, d]`` in the dtype of ``out``; ``zero`` never looks at ``out``, nor does ``uniform attention``.
    """
    if others == ZERO:
        return torch.zeros_like(out)
    said = out if others == MEAN else value
    wide = torch.promote_types(out.dtype, torch.float32)
    return said.mean(dim=2, keepdim=True, dtype=wide).to(out.dtype).expand_as(out)
