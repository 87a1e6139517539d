"""The reconstruction loss: texture against plain loops, shifts, and what each part feels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from percov2.models.perceptual import LPIPS
from percov2.training.losses import (
    ReconstructionLoss,
    View,
    draw_view,
    randomly_shifted,
    texture_distance,
)

WHOLE, HALVED = View(None, coarse=False), View(None, coarse=True)


def plain_texture(maps: list[Tensor], references: list[Tensor], size: tuple[int, int]) -> float:
    """texture_distance, window by window."""
    rows, columns = (max(1, round(side / 64)) for side in size)
    values = []
    for x, y in zip(maps, references, strict=True):
        found = []
        down, across = min(rows, x.shape[2]), min(columns, x.shape[3])
        for b in range(x.shape[0]):
            for i in range(down):
                for j in range(across):
                    # The edges of adaptive pooling: every place lies in a window.
                    top, bottom = i * x.shape[2] // down, -(-(i + 1) * x.shape[2] // down)
                    left, right = j * x.shape[3] // across, -(-(j + 1) * x.shape[3] // across)
                    above = below = 0.0
                    for c in range(x.shape[1]):
                        cut = (b, c, slice(top, bottom), slice(left, right))
                        s = np.sqrt(np.var(x[cut].numpy()) + 1e-3)
                        r = np.sqrt(np.var(y[cut].numpy()) + 1e-3)
                        above += (s - r) ** 2
                        below += s**2 + r**2
                    found.append(above / below)
        values.append(np.mean(found))
    return float(np.mean(values))


def test_texture_is_that_of_plain_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, h, w, generator=generator) for c, h, w in [(3, 40, 33), (2, 9, 1)]]
    others = [m * 0.3 + 0.5 * torch.randn(m.shape, generator=generator) for m in maps]
    expected = plain_texture(maps, others, (130, 189))
    assert float(texture_distance(maps, others, (130, 189))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("side", [32, 113, 177, 241])
def test_texture_looks_at_every_pixel(side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, side, side, generator=generator).requires_grad_()
    texture_distance([x], [2 * x.detach()], (side, side)).backward()
    assert x.grad is not None and (x.grad != 0).all()


def test_texture_feels_blur_but_not_place() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, 128, 128, generator=generator)
    assert float(texture_distance([x], [x], (128, 128))) == 0
    # Another sample of the same texture, and the same one blurred.
    other = torch.randn(1, 3, 128, 128, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(x, 5, 1, 2)
    near, far = (float(texture_distance([y], [x], (128, 128))) for y in (other, blurred))
    assert near < 0.01 < 0.3 < far


def test_a_flat_picture_is_pulled_toward_texture() -> None:
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    faint = (1e-2 * x).requires_grad_()
    texture_distance([faint], [x], (64, 64)).backward()
    assert faint.grad is not None and torch.isfinite(faint.grad).all()
    assert float((faint.grad * x).sum()) < 0  # descent amplifies


def test_shifts_are_the_same_for_all_and_reach_every_phase() -> None:
    torch.manual_seed(0)
    x = torch.arange(20 * 24.0).view(1, 1, 20, 24)
    seen = set()
    for _ in range(3000):
        a, b = randomly_shifted(x, x + 1)
        assert a.shape == (1, 1, 5, 9)
        assert torch.equal(b - a, torch.ones_like(a))
        seen.add(divmod(int(a[0, 0, 0, 0]), 24))
    assert seen == {(i, j) for i in range(16) for j in range(16)}


def test_every_part_reaches_the_picture_by_its_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    photo = torch.rand(1, 3, 96, 96, generator=generator) * 2 - 1
    start = 0.5 * photo

    def gradient(loss: ReconstructionLoss) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(3)  # the same shift
        image = start.clone().requires_grad_()
        value, figures = loss(image, photo, draw_view(0.0, 0.0))
        value.backward()
        assert image.grad is not None
        return image.grad, figures

    plain, figures = gradient(ReconstructionLoss(0.0))
    assert set(figures) == {"l1", "lpips", "texture"} and torch.isnan(figures["texture"])
    assert torch.allclose(plain, (start - photo).sign() / photo.numel(), atol=1e-9)
    some, _ = gradient(ReconstructionLoss(0.5))
    more, _ = gradient(ReconstructionLoss(1.0))
    assert torch.allclose(more - plain, 2 * (some - plain), atol=1e-7)
    assert not torch.allclose(some, plain, atol=1e-7)
    textured, figures = gradient(ReconstructionLoss(0.0, 1.0))
    assert figures["texture"] > 0
    assert float(((textured - plain) * photo).sum()) < 0  # half the contrast: descent raises it


def test_a_share_of_the_calls_is_aligned() -> None:
    generator = torch.Generator().manual_seed(1)
    photo = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1

    def values(aligned: float) -> list[float]:
        torch.manual_seed(0)
        loss = ReconstructionLoss(1.0)
        views = [draw_view(aligned, 0.0) for _ in range(24)]
        return [float(loss(0.5 * photo, photo, view)[1]["lpips"]) for view in views]

    fixed = LPIPS("alex")
    there = fixed.distance(fixed.features(0.5 * photo), fixed.features(photo)).item()
    assert values(1.0) == pytest.approx([there] * 24)
    assert len(set(values(0.0))) > 12
    at_phase = [value == pytest.approx(there) for value in values(0.5)]
    assert 4 < sum(at_phase) < 20


def test_weights_of_a_call_replace_the_module_s() -> None:
    generator = torch.Generator().manual_seed(1)
    photo = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    expected, figures = ReconstructionLoss(0.7, 0.2)(0.5 * photo, photo, WHOLE)
    value, again = ReconstructionLoss(0.1)(0.5 * photo, photo, WHOLE, 0.7, 0.2)
    assert torch.equal(value, expected)
    assert all(torch.equal(again[key], value) for key, value in figures.items())
    plain, _ = ReconstructionLoss(0.7)(0.5 * photo, photo, WHOLE, 0.0)
    assert torch.equal(plain, figures["l1"])


def test_coarse_calls_do_not_feel_what_two_by_two_means_hide() -> None:
    generator = torch.Generator().manual_seed(1)
    photo = functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (96, 96)) - 0.5
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    checks = photo + 0.3 * (-1.0) ** (rows + columns)
    loss = ReconstructionLoss(1.0, 1.0)
    _, fine = loss(checks, photo, WHOLE)
    _, coarse = loss(checks, photo, HALVED)
    assert fine["lpips"] > 0.005 and fine["texture"] > 0.01
    assert coarse["lpips"] < 1e-6 and coarse["texture"] < 1e-6
    assert torch.equal(coarse["l1"], fine["l1"])
    small = LPIPS("alex")(*(functional.avg_pool2d(x, 2) for x in (0.5 * photo, photo))).item()
    assert float(loss(0.5 * photo, photo, HALVED)[1]["lpips"]) == pytest.approx(small)
    torch.manual_seed(0)
    assert 4 < sum(draw_view(0.0, 0.5).coarse for _ in range(24)) < 20


def test_crops_that_are_too_small_are_refused() -> None:
    tiny = torch.zeros(1, 3, 46, 48)
    with pytest.raises(ValueError, match="48x46 are too small"):
        ReconstructionLoss(1.0)(tiny, tiny, WHOLE)
    least = torch.zeros(1, 3, 47, 47)
    assert torch.isfinite(ReconstructionLoss(1.0, 1.0)(least, least, draw_view(0.0, 0.0))[0])
    with pytest.raises(ValueError, match="make them 79 pixels"):
        ReconstructionLoss(1.0)(torch.zeros(1, 3, 78, 80), torch.zeros(1, 3, 78, 80), HALVED)
    least = torch.zeros(1, 3, 79, 79)
    assert torch.isfinite(ReconstructionLoss(1.0, 1.0)(least, least, draw_view(0.0, 1.0))[0])
