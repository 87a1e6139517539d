"""First weights of the joint phase from another run or model folder, even with other rates."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from percov2.models.tiny.torch.backbone import TinyTorchModel
from percov2.training import checkpoint
from percov2.training.rates import RateNetworks
from percov2.training.stage1 import CodecStage

__all__ = ["start_from", "stored_state"]

_SHARED = ("autoencoder", "flow", "text_encoder")
_OWN = ("quantizer.codebook", "quantizer.usage")
State = dict[str, Tensor]


def _part(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _stored_rates(state: State, first: str) -> dict[str, State]:
    """Return the weights of every rate of a run.

    The oldest runs have one rate without a name, which gets the name ``first``.
    """
    if any(key.startswith("hyper_encoder.") for key in state):
        own = ("hyper_encoder.", "quantizer.")
        return {first: {k: v for k, v in state.items() if k.startswith(own)}}
    names = dict.fromkeys(key.split(".")[1] for key in state if key.startswith("rates."))
    return {name: _part(state, f"rates.{name}.") for name in names}


def _inherit(networks: RateNetworks, donor: State) -> list[str]:
    """Copy fitting tensors from another rate. Return the names of the tensors that stay unchanged.

    A strided 5×5 convolution gets a donor's 1×1 convolution, averaged over 2×2 latents. Thus the
    new rate starts as the donor on coarser latents. A 1×1 convolution gets the sum of a donor's 5×5
    taps, which gives equal results on constant latents. Codes come from the first batch.
    """
    fresh = []
    for name, value in networks.state_dict().items():
        old = donor.get(name)
        if old is None or name in _OWN or old.shape[:2] != value.shape[:2]:
            fresh.append(name)
        elif old.shape == value.shape:
            value.copy_(old)
        elif (old.shape[2:], value.shape[2:]) == ((1, 1), (5, 5)):
            # With padding 2 and stride 2, taps 2 and 3 of output i are at latents 2i and 2i + 1.
            value.zero_()
            value[:, :, 2:4, 2:4] = old / 4
        elif (old.shape[2:], value.shape[2:]) == ((5, 5), (1, 1)):
            value.copy_(old.sum((2, 3), keepdim=True))
        else:
            fresh.append(name)
    return fresh


def _places(state: State) -> dict[int, tuple[str, list[str]]]:
    """Return the prefixes of a decoder's plain layers, each with those of the blocks after it."""
    places: dict[int, tuple[str, list[str]]] = {}
    for index in sorted({int(k.split(".")[1]) for k in state if k.startswith("decoder.")}):
        prefix = f"decoder.{index}."
        if f"{prefix}conv1.weight" in state:
            places[len(places) - 1][1].append(prefix)
        else:
            places[len(places)] = prefix, []
    return places


def _strongest(state: State, blocks: list[str], count: int) -> list[str]:
    """Return at most ``count`` blocks in their order, those with the largest weights.

    A block adds the output of two convolutions to its input, so small weights change little.
    """
    size = {b: state[f"{b}conv1.weight"].norm() * state[f"{b}conv2.weight"].norm() for b in blocks}
    kept = sorted(blocks, key=lambda block: -float(size[block]))[:count]
    return [block for block in blocks if block in kept]


def _fitted(fresh: State, stored: State) -> tuple[State, int]:
    """Return weights for a decoder of another depth or width, and the number of new tensors.

    New blocks start as the identity, so a deeper decoder starts with the stored decoder's output. A
    shallower decoder keeps the blocks with the largest weights, a narrower one what fits
    (``CodecConfig.distil``).
    """
    fitted, new = {k: v for k, v in stored.items() if not k.startswith("decoder.")}, 0
    known = _places(stored)
    for place, (plain, blocks) in _places(fresh).items():
        old_plain, old_blocks = known.get(place, ("", []))
        old = [old_plain, *_strongest(stored, old_blocks, len(blocks))]
        for prefix, old_prefix in zip_longest([plain, *blocks], old):
            for name, value in _part(fresh, prefix).items():
                candidate = stored.get(f"{old_prefix}{name}", value[:0])
                fits = candidate.shape == value.shape
                fitted[prefix + name] = candidate if fits else value
                new += not fits
    return fitted, new


def _model_state(folder: Path) -> State:
    """Return the weights of a model folder under the names that a codec run uses."""
    model = TinyTorchModel(folder)
    parts: dict[str, torch.nn.Module] = {name: getattr(model, name) for name in _SHARED}
    if model.dial is not None:
        parts["dial"] = model.dial
    for rate in model.config.rates:
        parts[f"rates.{rate.name}.hyper_encoder"] = model.hyper_encoder(rate.name)
        parts[f"rates.{rate.name}.quantizer"] = model.quantizer(rate.name)
    return {f"{k}.{n}": v for k, part in parts.items() for n, v in part.state_dict().items()}


def stored_state(run: Path) -> tuple[State, dict[str, Any], Path]:
    """Return the weights, the discriminators and the path of a codec run or a model folder."""
    path = run / "checkpoint.pt"
    if checkpoint.is_present(path):
        stored = checkpoint.read(path)
        return stored["ema"], stored.get("side", {}), path
    if (run / "config.json").is_file():
        return _model_state(run), {}, run
    wanted = "give the folder of a codec run or of a model"
    raise ValueError(f"{run} contains neither checkpoint.pt nor config.json; {wanted}")


@torch.no_grad()
def start_from(stage: CodecStage, run: Path) -> dict[str, str]:
    """Load the averaged weights of a codec run: shared networks, rates and discriminators.

    The optimisers of the discriminators start from scratch. A rate that the run lacks starts from
    the run's first rate. The decoder may have other blocks and widths; additional blocks start as
    the identity.

    Args:
        stage: initialised stage, which is changed in place.
        run: folder made by ``percov2 train codec``, or a model folder.

    Returns:
        The origin of each rate's weights as a phrase, and the decoder's origin if it is partly new.

    Raises:
        ValueError: the folder is neither a codec run nor a model folder, or its networks have other
            sizes.
    """
    state, side, path = stored_state(run)
    stored = _stored_rates(state, next(iter(stage.rates)))
    if not stored:
        raise ValueError(f"{path} is from another phase; give the folder of a codec run")
    origins = {}
    try:
        for name in _SHARED:
            part, module = _part(state, f"{name}."), stage.get_submodule(name)
            if name == "autoencoder":
                part, new = _fitted(module.state_dict(), part)
                if new:
                    origins["decoder"] = f"from the run, except for {new} new tensors"
            module.load_state_dict(part)
        dial = _part(state, "dial.")
        # A new dial has no effect, so it fits a model without one.
        if stage.dial is not None and dial:
            stage.dial.load_state_dict(dial)
        for name in stage.adversaries.keys() & side.keys():
            stage.adversaries[name].network.load_state_dict(side[name]["network"])
        donor_name, donor = next(iter(stored.items()))
        for name, networks in stage.rates.items():
            assert isinstance(networks, RateNetworks)
            if name in stored:
                networks.load_state_dict(stored[name])
                origins[name] = f"from {name}"
            else:
                fresh = _inherit(networks, donor)
                origins[name] = f"from {donor_name}, except for new {', '.join(fresh)}"
    except RuntimeError as error:
        raise ValueError(f"{path} does not match the configuration: {error}") from error
    return origins
