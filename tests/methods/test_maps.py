"""Segments, heat and paint from maps."""

import torch

from attune.methods import maps as maths


def test_segments():
    maps_ = torch.zeros(1, 4, 2, 3)
    maps_[0, 0] = 1.0  # the start token
    maps_[0, 1, 0] = 4.0
    maps_[0, 2, 0] = 2.0
    maps_[0, 3, 1, 2] = 1.5
    labels = maths.segment(maps_, [[1, 2], [3]], (2, 3))
    assert labels.tolist() == [[[1, 1, 1], [0, 0, 2]]]
    masks = maths.masks(labels, 2)
    assert masks.shape == (2, 1, 2, 3) and masks.sum() == 4
    large = maths.segment(maps_, [[1, 2], [3]], (8, 12))
    assert large.shape == (1, 8, 12) and set(large.unique().tolist()) == {0, 1, 2}
    assert not maths.segment(torch.ones_like(maps_), [[1, 2], [3]], (2, 3)).any()  # even attention is of nothing
    assert maths.segment(maps_, [[1, 2], [3]], (2, 3), threshold=1.0).eq(0).all()
    pair = torch.stack([maps_[:, 0], maps_[:, 1]], dim=1)
    assert maths.foreground(pair, (2, 3)).tolist() == [[[1, 1, 1], [0, 0, 0]]]


def test_heat_and_paint():
    image = torch.rand(2, 8, 9, 3)
    flat = maths.minmax(torch.full((2, 1, 8, 9), 3.0))
    assert torch.equal(flat, torch.zeros_like(flat))
    soft = maths.minmax(torch.rand(2, 8, 9))
    assert soft.amin() == 0 and 0.999 < soft.amax() <= 1
    painted = maths.heat(image, soft)
    assert painted.shape == image.shape and painted.min() >= 0 and painted.max() <= 1
    assert torch.equal(maths.heat(image, soft, 0.0), image)
    hot, cold = maths.heat(image, torch.ones(2, 8, 9), 1.0), maths.heat(image, torch.zeros(2, 8, 9), 1.0)
    assert hot[0, 0, 0, 0] > cold[0, 0, 0, 0]  # red is hot
    labels = torch.randint(0, 9, (2, 8, 9))
    solid = maths.paint(image, labels, 1.0)
    for label in range(9):
        colour = maths.COLOURS[0 if label == 0 else (label - 1) % 7 + 1]
        torch.testing.assert_close(solid[labels == label], torch.tensor(colour).expand(int((labels == label).sum()), 3))
