"""Stage 1 on Stable Diffusion 3, as in PerCoV2 (arXiv 2503.09368, §3).

The method is flow matching with z_hat beside the noisy latents. Timesteps are drawn as in SD3
(logit-normal, then shifted), and a tenth of the captions is dropped. Above 0.05 bpp, LPIPS on the
decoded one-step estimate is added.

Every sample has its own random generator. Therefore the content of a step does not depend on the
number of processes and forward passes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from percov2.models.config import LATENT_SIDE
from percov2.models.torch.quantizer import Quantized
from percov2.training.rates import perplexity
from percov2.training.sd3.frozen import FrozenNetworks
from percov2.training.sd3.networks import SD3Networks
from percov2.training.sd3.pictures import Pictures
from percov2.training.shards import CropFeed, Sample, ShardStreams
from percov2.training.stage import ALONE, Figures, Place, TrainingStage

__all__ = ["SD3Stage", "shifted"]

_LATENT_CHANNELS = 16


class SD3Stage(TrainingStage):
    """Flow matching on crops of ``.tar`` shards. The codes move after every step.

    The stage trains ``networks`` in place. At every checkpoint it restores ``pictures``, unless it
    is None.
    """

    whole_batches = True
    tables = ("validation.csv",)

    def __init__(
        self, networks: SD3Networks, shards: list[Path], seed: int, pictures: Pictures | None = None
    ) -> None:
        super().__init__()
        self.networks = networks
        self.config = config = networks.config
        self.streams = ShardStreams(shards, config.batch, config.crop, config.longest, seed)
        self.pictures = pictures
        self._seen: list[Quantized] = []
        self.start_run(ALONE)

    def stored_keys(self) -> set[str]:
        """Return the keys that training changes."""
        return {f"networks.{key}" for key in self.networks.stored_keys()}

    def start_run(self, place: Place) -> None:
        super().start_run(place)
        base = self.networks.open_base(str(place.device))
        width = int(self.networks.flow.config["joint_attention_dim"])
        self.frozen = FrozenNetworks(base, width, self.config.gradient_checkpointing)
        self.feed = CropFeed(self.streams, place.process, place.processes, place.accumulate)

    def forward(self, generator: np.random.Generator) -> tuple[Tensor, Figures]:
        """Return the loss and figures of the next samples of the shards. Ignore ``generator``."""
        config, networks, device = self.config, self.networks, self.place.device
        samples = self.feed.take()
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        images = pixels.permute(0, 3, 1, 2).to(device).float().div_(127.5).sub_(1.0)
        drawn = [_draw(sample, config.caption_dropout, config.crop) for sample in samples]
        t = shifted(torch.tensor([d.time for d in drawn], device=device), config.shift)
        mix = t.view(-1, 1, 1, 1)
        # Hyper-encoder and quantizer run in float32 as in the codec, so the tokens are the same.
        with torch.autocast(device.type, enabled=False):
            latents = self.frozen.latents(images)
            quantized: Quantized = networks.quantizer(networks.hyper_encoder(latents))
        self._seen.append(quantized)
        noise = torch.stack([d.noise for d in drawn]).to(device)
        noisy = (1 - mix) * latents + mix * noise
        text = self.frozen.text([d.caption for d in drawn])
        velocity = networks.velocity(noisy, quantized.z_hat, t, text)
        flow = (velocity - (noise - latents)).square().mean()
        loss = flow + config.vq_weight * quantized.loss - config.spread_weight * quantized.spread
        lpips = torch.tensor(math.nan)
        if config.lpips_weight:
            with torch.autocast(device.type, enabled=False):
                lpips = self.frozen.lpips(noisy - mix * velocity, images)
            loss = loss + config.lpips_weight * lpips
        return loss, {
            "flow": flow.detach(),
            "lpips": lpips.detach(),
            "vq": quantized.loss.detach(),
            "spread": quantized.spread.detach(),
            "codes": perplexity(networks.quantizer.usage),
        }

    def after_step(self) -> None:
        """Move the codes towards the hyper-latents of the whole batch, in every process alike."""
        seen, self._seen = self._seen, []
        # [forward passes · own positions, tokens per image, ...]
        directions = torch.cat([q.directions.view(*q.tokens.flatten(1).shape, -1) for q in seen])
        tokens = torch.cat([q.tokens.flatten(1) for q in seen])
        directions, tokens = self._all_places(directions), self._all_places(tokens)
        directions, decay = directions.flatten(0, 1), self.config.codebook_decay
        seed = np.random.default_rng([self.place.seed, self.step]).integers(2**63)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed))
            self.networks.quantizer.update_codebook(directions, tokens, decay=decay)

    def _all_places(self, own: Tensor) -> Tensor:
        """Return the rows of all processes in the order of the batch (collective)."""
        if self.place.processes == 1:
            return own
        from accelerate.utils import gather

        rows = gather(own.contiguous()).view(self.place.processes, *own.shape)
        return rows.transpose(0, 1).flatten(0, 1)

    def side_state(self) -> dict[str, Any]:
        """Return the positions of the streams of all processes (collective)."""
        from accelerate.utils import gather_object

        parts = gather_object([self.feed.positions()])
        return {"positions": {place: at for part in parts for place, at in part.items()}}

    def load_side_state(self, state: dict[str, Any]) -> None:
        self.feed.go_to(state["positions"])

    def draw_samples(self, folder: Path, step: int) -> None:
        """Restore the validation pictures, if any, and measure their flow loss."""
        if self.pictures is not None:
            self.pictures.restore(self.networks, self.frozen, folder, step)


class _Drawn(NamedTuple):
    """The random draws of a sample: the time before the shift, a caption or "", and the noise."""

    time: float
    caption: str
    noise: Tensor


def _draw(sample: Sample, caption_dropout: float, crop: int) -> _Drawn:
    random = sample.randomness
    time = 1 / (1 + math.exp(-random.standard_normal()))
    caption = "" if random.random() < caption_dropout else sample.caption
    generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    side = crop // LATENT_SIDE
    return _Drawn(time, caption, torch.randn(_LATENT_CHANNELS, side, side, generator=generator))


def shifted(t: Tensor, shift: float) -> Tensor:
    """Apply SD3's timestep shift (arXiv 2403.03206, §5.3.2) to t in 0 … 1.

    A shift of 1 changes nothing.
    """
    return shift * t / (1 + (shift - 1) * t)
