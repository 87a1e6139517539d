"""The losses: their weights over a run, the networks' inputs, and the effect of realism."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from percov2.models.torch.perceptual import LPIPS
from percov2.training.losses import (
    FEATURE_CHANNELS,
    FEATURES,
    Comparison,
    LossTerms,
    PerceptualNetworks,
    Term,
    View,
    draw_view,
    weighted,
)

CORNER = torch.zeros(2, dtype=torch.int64)


def view(coarse: bool = False, window: int = 64) -> View:
    """The whole picture for AlexNet, its first window for VGG16."""
    return View(None, CORNER, window, coarse)


@pytest.fixture(scope="module")
def networks() -> PerceptualNetworks:
    return PerceptualNetworks({"alex", "vgg"})


@pytest.fixture(scope="module")
def photo() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 96, 96, generator=generator) * 2 - 1


def test_a_term_waits_rises_and_stays():
    term = Term(0.5, from_step=10, warmup=9)
    found = [term.at(step) for step in (9, 10, 14, 19, 500)]
    assert found == pytest.approx([0, 0.05, 0.25, 0.5, 0.5])
    assert Term(2.0).at(0) == 2.0
    terms = LossTerms(alex=Term(0.8), vgg=Term(1.0, from_step=5))
    assert terms.at(4) == {"alex": 0.8} and terms.at(5) == {"alex": 0.8, "vgg": 1.0}
    assert terms.named() == ["alex", "vgg"]
    for wrong in ({"weight": -1.0}, {"from_step": -1}, {"warmup": -1}, {"weight": np.nan}):
        with pytest.raises(ValueError, match="negative"):
            Term(**wrong)


def test_the_loss_is_that_of_the_module_s_formula():
    generator = torch.Generator().manual_seed(0)
    l1, mse, alex, vgg, realism = torch.rand(5, 4, generator=generator)
    weights = {k: torch.tensor(v) for k, v in (("mse", 2.0), ("alex", 0.8), ("vgg", 1.5))}
    loss, figures = weighted(Comparison(l1, mse, alex, vgg, [], []), realism, weights)
    samples = [
        float(l1[i])
        + (1 - float(realism[i])) * 2.0 * float(mse[i])
        + float(realism[i]) * (0.8 * float(alex[i]) + 1.5 * float(vgg[i]))
        for i in range(4)
    ]
    assert float(loss) == pytest.approx(np.mean(samples), rel=1e-6)
    assert float(figures["vgg"]) == pytest.approx(float(vgg.mean()))
    plain, figures = weighted(Comparison(l1, mse, None, None, [], []), realism, {})
    assert torch.equal(plain, l1.mean()) and figures["lpips"].isnan() and figures["vgg"].isnan()


def test_networks_see_whole_pictures_or_windows(networks, photo):
    seen = View(torch.tensor([3, 7]), torch.tensor([20, 5]), 60)
    found = networks.compare(0.5 * photo, photo, seen, frozenset({"alex", "vgg"}))
    cut = (slice(None), slice(None), slice(3, 84), slice(7, 88))
    alex = LPIPS("alex")(0.5 * photo[cut], photo[cut])
    assert torch.allclose(found.alex, alex, atol=1e-5)
    cut = (slice(None), slice(None), slice(20, 80), slice(5, 65))
    assert torch.allclose(found.vgg, LPIPS("vgg")(0.5 * photo[cut], photo[cut]), atol=1e-5)
    assert torch.allclose(found.l1, (0.5 * photo).abs().mean((1, 2, 3)))
    assert torch.allclose(found.mse, (0.5 * photo).square().mean((1, 2, 3)))
    assert found.found == found.wanted == []


def test_only_networks_with_a_weight_run_and_gradients_reach_pictures(networks, photo):
    found = networks.compare(photo, photo, view(), frozenset({"alex"}))
    assert found.vgg is None and found.alex is not None
    found = networks.compare(photo, photo, view(), frozenset({"features"}))
    assert found.alex is None and found.vgg is None
    assert [x.shape[1] for x in found.found] == list(FEATURE_CHANNELS)
    assert [x.shape[-1] for x in found.wanted] == [5, 32, 16, 8]
    assert {name for name, _ in FEATURES} == {"alex", "vgg"}
    image = (0.5 * photo).requires_grad_()
    found = networks.compare(image, photo, view(window=96), frozenset({"alex", "vgg", "features"}))
    for value in (found.alex.sum(), found.vgg.sum(), *(x.sum() for x in found.found)):
        (gradient,) = torch.autograd.grad(value, image, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert not any(x.requires_grad for x in (*networks.parameters(), *found.wanted))


def test_views_reach_every_phase_and_stay_inside():
    torch.manual_seed(0)
    shifts, windows = set(), set()
    for _ in range(3000):
        drawn = draw_view(80, 0.0, 0.0, 60)
        assert drawn.shift is not None and drawn.window_side == 60
        shifts.add(tuple(drawn.shift.tolist()))
        windows.add(tuple(drawn.window.tolist()))
    assert shifts == {(i, j) for i in range(16) for j in range(16)}
    assert {i for i, _ in windows} == set(range(21)) == {j for _, j in windows}
    whole = draw_view(80, 0.0, 0.0, 1000)
    assert whole.window_side == 65 and int(whole.window.max()) <= 15
    drawn = [draw_view(64, 0.5, 0.25, 64) for _ in range(400)]
    assert 150 < sum(v.shift is None for v in drawn) < 250
    assert 60 < sum(v.coarse for v in drawn) < 140
    assert all(draw_view(64, 1.0, 0.0, 64).shift is None for _ in range(20))


def test_coarse_views_do_not_feel_what_two_by_two_means_hide(networks):
    generator = torch.Generator().manual_seed(1)
    photo = functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), (96, 96)) - 0.5
    rows, columns = torch.meshgrid(torch.arange(96), torch.arange(96), indexing="ij")
    checks = photo + 0.3 * (-1.0) ** (rows + columns)
    fine, coarse = (
        networks.compare(checks, photo, view(halved), frozenset({"alex"}))
        for halved in (False, True)
    )
    assert float(fine.alex) > 0.005 and float(coarse.alex) < 1e-6
    assert torch.equal(coarse.l1, fine.l1)


def test_crops_that_are_too_small_are_refused(networks):
    active = frozenset({"alex"})
    for sides, halved, least in (((46, 48), False, 47), ((78, 80), True, 79)):
        tiny, fits = torch.zeros(1, 3, *sides), torch.zeros(1, 3, least, least)
        with pytest.raises(ValueError, match=f"{sides[1]}x{sides[0]} are.*at least {least} pixels"):
            networks.compare(tiny, tiny, view(halved, 16), active)
        for shift in (None, torch.tensor([15, 15])):
            seen = View(shift, CORNER, 16, halved)
            assert torch.isfinite(networks.compare(fits, fits, seen, active).alex).all()
