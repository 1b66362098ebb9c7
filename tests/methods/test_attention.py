"""The mathematics of attention and SoftPAG against plain loops in float64."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import attune.methods.attention as attention

B, H, M, N, D = 2, 3, 7, 5, 4


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


Q, K, V = tensor(B, H, M, D, seed=1), tensor(B, H, N, D, seed=2), tensor(B, H, N, D, seed=3)


def naive(q, k, scale=None, mask=None):
    """Weights, one at a time."""
    b, h, m, d = q.shape
    n = k.shape[2]
    out = torch.zeros(b, h, m, n, dtype=torch.float64)
    for i in range(b):
        for j in range(h):
            for r in range(m):
                e = [float((q[i, j, r] * k[i, j, c]).sum()) * (d**-0.5 if scale is None else scale) for c in range(n)]
                if mask is not None:
                    e = [x + float(mask.expand(b, h, m, n)[i, j, r, c]) for c, x in enumerate(e)]
                e = torch.tensor(e, dtype=torch.float64).exp()
                out[i, j, r] = e / e.sum()
    return out


@pytest.mark.parametrize("elements", [1, B * H * N * 3, 1 << 24])
@pytest.mark.parametrize("mask", [None, tensor(B, 1, M, N), tensor(B, 1, 1, N)], ids=["free", "mask", "key mask"])
def test_probabilities(elements, mask, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_ELEMENTS", elements)
    full = naive(Q, K, 0.7, mask)
    columns = torch.tensor([3, 0])
    torch.testing.assert_close(attention.probabilities(Q, K, None, 0.7, mask), full)
    torch.testing.assert_close(attention.probabilities(Q, K, columns, 0.7, mask), full[..., columns])
    torch.testing.assert_close(attention.probabilities(Q, K, columns, 0.7, mask, mean_heads=True), full[..., columns].mean(1))
    if mask is not None:
        kept = mask > 0
        kept[..., 0] = True
        additive = torch.zeros_like(mask).masked_fill(~kept, -torch.inf)
        torch.testing.assert_close(attention.probabilities(Q, K, None, None, kept), naive(Q, K, None, additive))
    assert attention.probabilities(Q.half(), K.half()).dtype == torch.float32


def test_recolumn_equals_the_edited_map():
    full, columns = naive(Q, K), [1, 4]
    after, rest = tensor(B, H, M, 2, seed=5).abs(), tensor(B, H, M, 1, seed=6).abs()
    for r in (None, rest):
        edited = full.clone() if r is None else full * r
        edited[..., columns] = after
        ours = attention.replace_columns(full @ V, V[:, :, columns], full[..., columns], after, r)
        torch.testing.assert_close(ours, edited @ V)


def test_shared_map():
    values = tensor(4, H, N, D, seed=7)
    mask = tensor(1, 1, M, N, seed=8)
    ours = attention.shared(Q[:1], K[:1], values, 0.6, mask)
    torch.testing.assert_close(ours, naive(Q[:1], K[:1], 0.6, mask) @ values)


def test_a_kernel_that_tells_the_sums_of_its_rows():
    """From them, few columns' weights need no other column."""
    q, k, v = Q.float(), K.float(), V.float()
    out, total = attention.attend(q, k, v, 0.7)
    full = naive(Q, K, 0.7)
    torch.testing.assert_close(out, (full @ V).float())
    torch.testing.assert_close(
        total.double(), (Q @ K.transpose(-1, -2) * 0.7).logsumexp(-1), check_dtype=False, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(attention.of_columns(q, k[:, :, [3, 0]], total, 0.7), full[..., [3, 0]].float())
    assert attention.attend(q.requires_grad_(), k, v) is None  # gradients are others' to take care of
    assert attention.attend(q.detach(), k[:, :1], v[:, :1]) is None and attention.attend(q.detach().to("meta"), k, v) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_kernel_of_a_gpu_by_its_shapes(dtype, monkeypatch):
    with FakeTensorMode():  # shapes, types and devices as on CUDA, with nothing computed
        q = torch.empty(B, M, H, 64, device="cuda", dtype=dtype).transpose(1, 2)
        k = torch.empty(B, N, H, 64, device="cuda", dtype=dtype).transpose(1, 2)
        monkeypatch.setattr(torch.version, "hip", None)
        out, total = attention.attend(q, k, k)
        assert out.shape == q.shape and out.dtype == dtype and total.shape == (B, H, M) and total.dtype == torch.float32
        assert attention.of_columns(q, k[:, :, :2], total).shape == (B, H, M, 2)
        assert (
            attention.attend(q[..., :40], k[..., :40], k[..., :40]) is None
            and attention.attend(q.float(), k.float(), k.float()) is None
        )
        monkeypatch.setattr(torch.version, "hip", "6.4")  # AMD: its sums may be to base 2
        assert attention.attend(q, k, k) is None
