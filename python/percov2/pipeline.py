"""The codec as a diffusers pipeline: ``from_pretrained``, ``compress``, ``decompress``.

A saved pipeline on Stable Diffusion 3 has its folder layout, with a widened, trained transformer.
Its extra component ``percov2`` is a percov2 model folder whose base model is the surrounding
pipeline. A saved pipeline of a small model has only that component, with all its networks.
``Codec.from_pretrained`` opens both. docs/how-to/diffusers.md shows the use.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
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
from torch import Tensor, nn

from percov2.codec import Codec, DecodedFile
from percov2.model_card import write_card
from percov2.models.backbone import BackboneOptions, check_runtime, open_backbone
from percov2.models.config import ModelConfig, find_model
from percov2.models.sd3.backbone import Sampling, SD3Model
from percov2.models.sd3.base import SD3Base
from percov2.models.sd3.text import TextNetworks
from percov2.models.torch.placement import TORCH_DTYPES, Placement
from percov2.options import DecodeOptions, EncodeOptions

__all__ = ["PerCoV2Pipeline", "TinyParts", "TrainedParts"]

_TEXT_KINDS, _TEXT_SUFFIXES = ("tokenizer", "text_encoder"), ("", "_2", "_3")
"""Parts of the names of the text networks, in the order of ``TextNetworks``."""
_COMPONENT = "percov2"
_CODE = {
    "pipeline.py": (
        '"""The class of this pipeline, for diffusers: percov2[torch] has it."""\n\n'
        "from percov2.pipeline import PerCoV2Pipeline  # noqa: F401\n"
    ),
    f"{_COMPONENT}/percov2.pipeline.py": (
        '"""The class of this component, for diffusers: percov2[torch] has it."""\n\n'
        "from percov2.pipeline import TinyParts, TrainedParts  # noqa: F401\n"
    ),
}
"""Files of a saved pipeline through which ``DiffusionPipeline`` finds its classes. diffusers looks
for a component's class in a file with the name of its module; otherwise it refuses repositories
with classes that are not its own."""
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_PUSH_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")
"""Files that are not downloaded: weights are safetensors files."""


# Among the component kinds of diffusers, only a scheduler has no weights in memory. These parts
# stay in their folder until they are used.
class TrainedParts(SchedulerMixin):
    """The hyper-encoders, quantizers and entropy models of all rates, in a folder.

    Raises:
        ValueError: the folder is not a percov2 model folder with the backbone "sd3".
    """

    backbone = "sd3"

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.codec_config = ModelConfig.load(self.folder)
        kind = self.codec_config.backbone
        if kind != self.backbone:
            raise ValueError(f"{folder} has the backbone {kind!r}, not {self.backbone!r}")

    @classmethod
    def from_pretrained(cls, path: Path | str, **_: Any) -> TrainedParts:
        """Open a folder written by ``save_pretrained``. Other options are ignored."""
        return cls(path)

    def save_pretrained(self, save_directory: Path | str, **_: Any) -> None:
        """Copy the parts of all rates into ``save_directory``, a pipeline's component folder."""
        target = Path(save_directory)
        if target.resolve() == self.folder.resolve():
            return
        dataclasses.replace(self.codec_config, base="..").save(target)
        for rate in self.codec_config.rates:
            for part in ("hyper_encoder", "quantizer", "entropy"):
                source = self.folder / rate.name / part
                shutil.copytree(source, target / rate.name / part, dirs_exist_ok=True)


class TinyParts(TrainedParts, nn.Module):
    """A whole small model, in a folder.

    The networks load when they are first used, on the device and in the number format to which this
    module was moved. They are not parameters of the module.

    Raises:
        ValueError: the folder is not a percov2 model folder with the backbone "tiny".
    """

    backbone = "tiny"

    def __init__(self, folder: Path | str) -> None:
        nn.Module.__init__(self)
        TrainedParts.__init__(self, folder)
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Return the device of the networks."""
        return self._buffers["_place"].device  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Return the number format of the networks that paint."""
        return self._buffers["_place"].dtype  # type: ignore[union-attr]

    @classmethod
    def from_pretrained(
        cls, path: Path | str, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> TinyParts:
        """Open a folder written by ``save_pretrained``. Other options are ignored."""
        return cls(path).to(torch_dtype)

    def save_pretrained(self, save_directory: Path | str, **_: Any) -> None:
        """Copy the model folder to ``save_directory``."""
        if Path(save_directory).resolve() != self.folder.resolve():
            shutil.copytree(self.folder, save_directory, dirs_exist_ok=True)


def _open_parts(folder: Path, dtype: object) -> TrainedParts:
    """Open the component of a saved pipeline; ``dtype`` is the one given for the pipeline."""
    if ModelConfig.load(folder).backbone != "tiny":
        return TrainedParts(folder)
    return TinyParts.from_pretrained(folder, dtype if isinstance(dtype, torch.dtype) else None)


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
    """PerCoV2 on Stable Diffusion 3, or a small model of percov2, as a diffusers pipeline.

    Args:
        percov2: the parts that percov2 adds, or a whole small model, which needs nothing else.
        vae, transformer, scheduler, text_encoder…, tokenizer…: as in diffusers'
            ``StableDiffusion3Pipeline``, but the transformer is widened for z_hat. The third text
            encoder and its tokenizer may be None.

    Raises:
        ValueError: a network is missing, or a small model is given other networks.

    >>> pipe = PerCoV2Pipeline.from_pretrained("owner/name")     # doctest: +SKIP
    >>> data = pipe.compress(image, prompt="a red door")         # doctest: +SKIP
    >>> pipe(data, num_inference_steps=20).images[0]             # doctest: +SKIP
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _exclude_from_cpu_offload = [_COMPONENT]  # noqa: RUF012 (diffusers' own form)
    _optional_components = [  # noqa: RUF012 (diffusers' own form)
        *("vae", "transformer", "scheduler"),
        *(kind + suffix for kind in _TEXT_KINDS for suffix in _TEXT_SUFFIXES),
    ]
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' own form)

    def __init__(
        self,
        percov2: TrainedParts,
        vae: AutoencoderKL | None = None,
        transformer: SD3Transformer2DModel | None = None,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
    ) -> None:
        super().__init__()
        networks = {
            "vae": vae,
            "transformer": transformer,
            "scheduler": scheduler,
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "text_encoder_2": text_encoder_2,
            "tokenizer_2": tokenizer_2,
        }
        third = {"text_encoder_3": text_encoder_3, "tokenizer_3": tokenizer_3}
        given = [name for name, one in {**networks, **third}.items() if one is not None]
        if isinstance(percov2, TinyParts):
            if given:
                raise ValueError(f"a small model has its own networks; leave out {given}")
        elif missing := [name for name in networks if name not in given]:
            raise ValueError(f"the pipeline lacks {', '.join(missing)}")
        self.register_modules(**networks, **third, percov2=percov2)
        self._codec: tuple[Placement, Codec] | None = None
        self._interrupt = False
        self._num_timesteps = 0

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> PerCoV2Pipeline:
        """Load a saved pipeline, as diffusers does, but only from safetensors files.

        Code in the folder or repository is not run.

        Args:
            path: a folder, or the hub id of a repository, which is downloaded.
            options: those of diffusers' ``DiffusionPipeline.from_pretrained``.
        """
        folder = Path(path)
        if not folder.is_dir():
            hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
            ignored = list(_PICKLES)
            found = huggingface_hub.snapshot_download(str(path), ignore_patterns=ignored, **hub)
            folder = Path(found)
        options = {"use_safetensors": True, **options}
        if _COMPONENT not in options:
            dtype = options.get("torch_dtype", options.get("dtype"))
            options[_COMPONENT] = _open_parts(folder / _COMPONENT, dtype)
        return super().from_pretrained(folder, **options)

    @classmethod
    def from_percov2(
        cls, name_or_path: str | Path, dtype: str | None = None, t5: bool = True
    ) -> PerCoV2Pipeline:
        """Return a pipeline on the CPU with the networks of a percov2 folder and its base model.

        Args:
            name_or_path: "tiny", "sd3:PATH" or a folder, as for ``Codec.from_pretrained``.
            dtype: "fp32", "bf16" or "fp16". None means "fp32".
            t5: True to load SD3's third text encoder.

        Raises:
            ValueError: there is no such model, it has another backbone, it does not accept an
                option, or several rates have their own flows (a pipeline has only one transformer).
        """
        folder, config = find_model(name_or_path)
        if config.backbone == "tiny":
            check_runtime(
                folder, "tiny", "cpu", BackboneOptions(runtime="torch", dtype=dtype, t5=t5)
            )
            return cls(TinyParts(folder).to(TORCH_DTYPES[dtype or "fp32"]))
        if config.backbone != "sd3":
            kind = config.backbone
            raise ValueError(f"{name_or_path} has the backbone {kind!r}, not 'sd3' or 'tiny'")
        model = open_backbone(name_or_path, "cpu", BackboneOptions(dtype=dtype, t5=t5))
        assert isinstance(model, SD3Model)
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
        return cls(parts, base.autoencoder(), flow, base.scheduler(), **texts)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        reports: Sequence[str | Path] = (),
        card: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Save the pipeline, as diffusers does, with a model card.

        A ``README.md`` that exists keeps its text; only the fields of ``card`` and the figures
        change.

        Args:
            save_directory: the folder, made if it is missing.
            safe_serialization, variant, max_shard_size, push_to_hub, options: as in diffusers.
            reports: report.json files of ``percov2 eval kodak`` or ``percov2 eval report`` of this
                model, whose means become figures of the card.
            card: fields of the card's front matter, such as license and base_model.

        Raises:
            ValueError: a report is damaged or of another model.
            OSError: a file cannot be read or written.
        """
        folder = Path(save_directory)
        hub = {name: options.pop(name) for name in _PUSH_OPTIONS if name in options}
        form = {"safe_serialization": safe_serialization, "variant": variant}
        super().save_pretrained(folder, max_shard_size=max_shard_size, **form, **options)
        for name, code in _CODE.items():
            (folder / name).write_text(code, encoding="utf-8")
        write_card(folder, self.percov2.codec_config, reports, card)
        if push_to_hub:
            hub = {"repo_id": folder.name, **hub, **form}
            self.push_to_hub(**hub, reports=reports, card=card)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        *,
        reports: Sequence[str | Path] = (),
        card: Mapping[str, Any] | None = None,
    ) -> str:
        """Upload what ``save_pretrained`` writes. Return the address of the commit.

        The card of an existing repository keeps its text. ``reports`` and ``card`` are those of
        ``save_pretrained``, the other arguments those of diffusers.
        """
        made = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        with TemporaryDirectory() as folder:
            if huggingface_hub.file_exists(made.repo_id, "README.md", token=token):
                there = huggingface_hub.hf_hub_download(made.repo_id, "README.md", token=token)
                shutil.copyfile(there, Path(folder) / "README.md")
            self.save_pretrained(folder, safe_serialization, variant, reports=reports, card=card)
            form = {"token": token, "commit_message": commit_message, "create_pr": create_pr}
            return self._upload_folder(folder, made.repo_id, **form)

    @property
    def codec(self) -> Codec:
        """Return the codec with this pipeline's networks, on their current device."""
        small = isinstance(self.percov2, TinyParts)
        dtype = (self.percov2 if small else self.transformer).dtype
        place = Placement(str(self._execution_device), dtype, False)
        if self._codec is None or self._codec[0] != place:
            folder, base = self.percov2.folder, _PipelineBase(self, place)
            codec = _small_codec(folder, place) if small else None
            codec = codec or Codec(SD3Model(folder, place.device, base=base))
            self._codec = place, codec
        return self._codec[1]

    @property
    def interrupt(self) -> bool:
        """Return True if a callback has set ``_interrupt`` to stop sampling."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Return the number of steps of the pictures that are being sampled."""
        return self._num_timesteps

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
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[list[Image.Image]]:
        """Restore the pictures of ``.pcv2`` files.

        With a generator or a callback, the pictures are sampled one after the other.

        Args:
            file: the bytes of one file, or a list of several.
            num_inference_steps: number of flow evaluations. None means the model's default.
            guidance_scale: scale of the guidance on the caption. None means the model's default.
            seed: seed of the starting noise, which all pictures share.
            return_dict: True to return an ``ImagePipelineOutput``, False to return a tuple.
            generator: source of the starting noise, in the order of the files, or a list with one
                generator per file. On Stable Diffusion 3, ``torch.Generator().manual_seed(7)``
                gives the first picture the noise of ``seed=7``. For a small model, whose noise is
                numpy's, a generator only draws a seed per file.
            callback_on_step_end: a function that is called after every step as
                ``function(pipeline, step, timestep, {"latents": latents})``. It returns a
                dictionary, whose "latents" replace those of the step. It may set
                ``pipeline._interrupt = True`` to stop sampling after this step; every later file
                then takes one step.
            callback_on_step_end_tensor_inputs: names of the tensors that the function is given. The
                only name is "latents".

        Raises:
            BitstreamError: a file is invalid.
            ValueError: an option is out of range, seed and generator are both given, the number of
                generators is wrong, or a small model is given a callback.
        """
        files = [file] if isinstance(file, bytes) else list(file)
        options = DecodeOptions(steps=num_inference_steps, guidance=guidance_scale, seed=seed)
        generators = _per_file(generator, len(files), seed)
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        if unknown := sorted(set(names) - set(self._callback_tensor_inputs)):
            raise ValueError(f"callbacks are given {self._callback_tensor_inputs}, not {unknown}")
        codec = self.codec
        if isinstance(self.percov2, TinyParts) and callback_on_step_end is not None:
            raise ValueError("a small model calls no function between its steps")
        decoded = codec.decode(files, options)
        self._interrupt = False
        if not isinstance(codec.model, SD3Model):
            images = _paint_small(codec, decoded, options, generators)
        else:
            images = self._sample(codec, decoded, options, generators, callback_on_step_end, names)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self,
        codec: Codec,
        decoded: Sequence[DecodedFile],
        options: DecodeOptions,
        generators: Sequence[torch.Generator] | None,
        callback: Callable[..., Any] | None,
        names: Sequence[str],
    ) -> list[Image.Image]:
        """Paint with a progress bar; one file at a time if a generator or a callback is given."""
        model = codec.model
        assert isinstance(model, SD3Model)
        steps = [options.steps or codec.config.default_steps(one.rate.name) for one in decoded]
        alone = generators is not None or callback is not None
        groups = [[one] for one in decoded] if alone else [list(decoded)]
        images: list[Image.Image] = []
        with self.progress_bar(total=sum(steps)) as bar:

            def on_step(step: int, time: Tensor, latents: Tensor) -> tuple[Tensor, bool]:
                if callback is not None:
                    given = dict.fromkeys(names, latents)
                    latents = (callback(self, step, time, given) or {}).get("latents", latents)
                bar.update(len(latents))
                return latents, self._interrupt

            for i, group in enumerate(groups):
                self._num_timesteps = max(steps[i : i + len(group)], default=0)
                source = generators[i] if generators is not None else None
                painter = Codec(model.with_sampling(Sampling(source, on_step)), captions=None)
                images += painter.paint(group, options)
        return images


def _per_file(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int, seed: int
) -> list[torch.Generator] | None:
    """Return one generator per file, or None without any."""
    if generator is None:
        return None
    if seed:
        raise ValueError("give seed or generator, not both")
    if isinstance(generator, torch.Generator):
        return [generator] * count
    if len(generator) != count:
        raise ValueError(f"{len(generator)} generators for {count} files; give one per file")
    return list(generator)


def _small_codec(folder: Path, place: Placement) -> Codec:
    """Return the codec of a small model on a device, painting in a number format."""
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    if place.dtype not in names:
        raise ValueError(f"a small model paints in {', '.join(map(str, names))}, not {place.dtype}")
    options = BackboneOptions(runtime="torch", dtype=names[place.dtype])
    return Codec.from_pretrained(folder, place.device, options)


def _paint_small(
    codec: Codec,
    decoded: Sequence[DecodedFile],
    options: DecodeOptions,
    generators: Sequence[torch.Generator] | None,
) -> list[Image.Image]:
    """Paint with a small model. A generator draws the seed of a file."""
    if generators is None:
        return codec.paint(decoded, options)
    images: list[Image.Image] = []
    for one, source in zip(decoded, generators, strict=True):
        seed = int(torch.randint(2**63 - 1, (1,), generator=source, device=source.device))
        images += codec.paint([one], dataclasses.replace(options, seed=seed))
    return images
