"""The codec as a diffusers pipeline: ``from_pretrained``, ``compress``, ``decompress``.

A saved pipeline has the folder layout of Stable Diffusion 3, with a widened, trained transformer.
Its extra component ``percov2`` is a percov2 model folder whose base model is the surrounding
pipeline. ``Codec.from_pretrained("sd3:PATH")`` therefore opens the same folder or hub repository.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    SchedulerMixin,
    SD3Transformer2DModel,
)
from PIL import Image

from percov2.codec import Codec
from percov2.models.backbone import BackboneOptions, open_backbone
from percov2.models.config import ModelConfig
from percov2.models.sd3.backbone import SD3Model
from percov2.models.sd3.base import SD3Base
from percov2.models.sd3.text import TextNetworks
from percov2.models.torch.placement import Placement
from percov2.options import EncodeOptions

__all__ = ["PerCoV2Pipeline", "TrainedParts"]

_TEXT_KINDS, _TEXT_SUFFIXES = ("tokenizer", "text_encoder"), ("", "_2", "_3")
"""Parts of the names of the text networks, in the order of ``TextNetworks``."""


# Among the component kinds of diffusers, only a scheduler has no weights in memory. These parts
# stay in their folder until they are used.
class TrainedParts(SchedulerMixin):
    """The hyper-encoders, quantizers and entropy models of all rates, in a folder.

    Raises:
        ValueError: the folder is not a percov2 model folder with the backbone "sd3".
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.codec_config = ModelConfig.load(self.folder)
        if self.codec_config.backbone != "sd3":
            raise ValueError(f"{folder} has the backbone {self.codec_config.backbone!r}, not 'sd3'")

    @classmethod
    def from_pretrained(cls, path: Path | str, **_: Any) -> TrainedParts:
        """Open a folder written by ``save_pretrained``. Other options are ignored."""
        return cls(path)

    def save_pretrained(self, save_directory: Path | str, **_: Any) -> None:
        """Copy the parts of all rates into ``save_directory``, a pipeline's component folder."""
        target = Path(save_directory)
        dataclasses.replace(self.codec_config, base="..").save(target)
        for rate in self.codec_config.rates:
            for part in ("hyper_encoder", "quantizer", "entropy"):
                source = self.folder / rate.name / part
                shutil.copytree(source, target / rate.name / part, dirs_exist_ok=True)


class _PipelineBase(SD3Base):
    """The base model, with the networks of a pipeline."""

    def __init__(self, pipeline: PerCoV2Pipeline, place: Placement) -> None:
        self.pipeline, self.place = pipeline, place

    def autoencoder(self) -> AutoencoderKL:
        return self.pipeline.vae

    def flow(self, rate: str) -> SD3Transformer2DModel:
        return self.pipeline.transformer

    def scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def text_networks(self) -> TextNetworks:
        parts = self.pipeline.components
        triples = [tuple(parts[kind + suffix] for suffix in _TEXT_SUFFIXES) for kind in _TEXT_KINDS]
        return TextNetworks(*triples)


class PerCoV2Pipeline(DiffusionPipeline):
    """PerCoV2 on Stable Diffusion 3.

    Args:
        vae, transformer, scheduler, text_encoder…, tokenizer…: as in diffusers'
            ``StableDiffusion3Pipeline``, but the transformer is widened for z_hat. The third text
            encoder and its tokenizer may be None.
        percov2: the parts that percov2 adds.

    >>> pipe = PerCoV2Pipeline.from_pretrained("owner/name")     # doctest: +SKIP
    >>> data = pipe.compress(image, prompt="a red door")         # doctest: +SKIP
    >>> pipe(data, num_inference_steps=20).images[0]             # doctest: +SKIP
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components = ["text_encoder_3", "tokenizer_3"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        percov2: TrainedParts,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            percov2=percov2,
        )
        self._codec: tuple[Placement, Codec] | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PerCoV2Pipeline:
        """Load a saved pipeline as diffusers does, but only from safetensors files."""
        return super().from_pretrained(path, **{"use_safetensors": True, **options})

    @classmethod
    def from_percov2(
        cls, name_or_path: str | Path, dtype: str | None = None, t5: bool = True
    ) -> PerCoV2Pipeline:
        """Return a pipeline on the CPU with the networks of a percov2 folder and its base model.

        Args:
            name_or_path: "sd3:PATH" or a folder, as for ``Codec.from_pretrained``.
            dtype: "fp32", "bf16" or "fp16". None means "fp32".
            t5: True to load SD3's third text encoder.

        Raises:
            ValueError: there is no such model, it has another backbone, or several rates have their
                own flows (a pipeline has only one transformer).
        """
        model = open_backbone(name_or_path, "cpu", BackboneOptions(dtype=dtype, t5=t5))
        if not isinstance(model, SD3Model):
            kind = model.config.backbone
            raise ValueError(f"{name_or_path} has the backbone {kind!r}, not 'sd3'")
        rates = [rate.name for rate in model.config.rates]
        own = [rate for rate in rates if (model.folder / rate / "flow").is_dir()]
        if own and len(rates) > 1:
            raise ValueError(
                f"{model.folder}: the rates {own} have their own flows, but a pipeline has one "
                "transformer; make one folder per rate"
            )
        base = model.base
        texts = {
            kind + suffix: network
            for kind, networks in zip(_TEXT_KINDS, base.text_networks(), strict=True)
            for suffix, network in zip(_TEXT_SUFFIXES, networks, strict=True)
        }
        flow = base.flow(model.config.default_rate)
        parts = TrainedParts(model.folder)
        return cls(base.autoencoder(), flow, base.scheduler(), percov2=parts, **texts)

    @property
    def codec(self) -> Codec:
        """Return the codec with this pipeline's networks, on their current device."""
        place = Placement(str(self._execution_device), self.transformer.dtype, False)
        if self._codec is None or self._codec[0] != place:
            base = _PipelineBase(self, place)
            self._codec = place, Codec(SD3Model(self.percov2.folder, place.device, base=base))
        return self._codec[1]

    def compress(
        self,
        image: Image.Image | Sequence[Image.Image],
        prompt: str | Sequence[str] = "",
        rate: str | None = None,
        schedule: str | None = None,
    ) -> Any:
        """Compress pictures into ``.pcv2`` files.

        Args:
            image: a picture, or a list of pictures of any sizes.
            prompt: one caption for all pictures, or one caption per picture. "" means none.
            rate: name of the rate. None means the model's default.
            schedule: name of the entropy schedule. None means the model's default.

        Returns:
            The bytes of the file, or a list of them if ``image`` is a list.

        Raises:
            ValueError: as in ``Codec.compress``.
        """
        options = EncodeOptions(rate=rate, schedule=schedule)
        if isinstance(image, Image.Image) and isinstance(prompt, str):
            files: Any = self.codec.compress(image, options, caption=prompt)
        else:
            images = [image] if isinstance(image, Image.Image) else list(image)
            captions = [prompt] * len(images) if isinstance(prompt, str) else list(prompt)
            files = self.codec.compress(images, options, caption=captions)
        self.maybe_free_model_hooks()
        return files

    def decompress(self, file: bytes | Sequence[bytes], **options: Any) -> Any:
        """Return the picture of a file, or a list of pictures for a list of files.

        ``options`` are those of ``__call__``.
        """
        images = self(file, return_dict=False, **options)[0]
        return images[0] if isinstance(file, bytes) else images

    @torch.no_grad()
    def __call__(
        self,
        file: bytes | Sequence[bytes],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 0,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[list[Image.Image]]:
        """Restore the pictures of ``.pcv2`` files.

        Args:
            file: the bytes of one file, or a list of several.
            num_inference_steps: number of flow evaluations. None means the model's default.
            guidance_scale: scale of the guidance on the caption. None means the model's default.
            seed: seed of the starting noise.
            return_dict: True to return an ``ImagePipelineOutput``, False to return a tuple.

        Raises:
            BitstreamError: a file is invalid.
            ValueError: an option is out of range.
        """
        files = [file] if isinstance(file, bytes) else list(file)
        images = self.codec.decompress(
            files, steps=num_inference_steps, guidance=guidance_scale, seed=seed
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
