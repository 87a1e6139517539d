"""The codec: pictures -> files -> pictures.

Compressing: picture -> tokens (float networks) -> intervals (one pass of the integer transformer)
-> rANS. Decompressing: header -> tokens, stage by stage -> check -> flow. Nothing is painted from a
file whose check fails.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from percov2.batching import TOKENS_AT_ONCE, Outcome, by_group
from percov2.caching import remembered
from percov2.coarser_rates import encode_bounded
from percov2.container import bitstream, tokens_file
from percov2.container.bitstream import MAX_PIXELS, BitstreamError, Header
from percov2.container.caption_model import CaptionModel
from percov2.container.captions import decode_caption, encode_caption
from percov2.container.model_id import check_model, model_id
from percov2.container.tokens_file import OpenFile, Tokens
from percov2.entropy.opening import open_coder
from percov2.entropy.schedule import SCHEDULES, check_name, stage_count
from percov2.entropy.token_coder import TokenCoder
from percov2.extras import require
from percov2.inputs import OneFile, OnePicture, as_files, as_pictures, rgb_array
from percov2.many_pictures import CaptionSource, compress_many, decompress_many
from percov2.models.backbone import Backbone, BackboneOptions, open_backbone
from percov2.models.config import ModelConfig, Rate
from percov2.options import DecodeOptions, EncodeOptions, options_from
from percov2.tokenizing import ArraySearch, CaptionedSearch, TokenChoice, token_maps

__all__ = ["CAPTIONS", "Codec", "DecodedFile"]


CAPTIONS = Path(__file__).parent / "pretrained" / "captions"
"""The embedded caption model. Files name only its codec, so the model never changes."""


@dataclass(frozen=True)
class DecodedFile:
    """The content of a valid file.

    Attributes:
        header: the fields of the header.
        rate: the rate point with the index ``header.rate``.
        caption: the caption's text, "" if there is none.
        tokens: int32 [h, w].
        stages: the file holds tokens of stages 1..stages; later ones were drawn.
        bits: cost of header, caption and check, as in ``bitstream.ParsedFile``.
    """

    header: Header
    rate: Rate
    caption: str
    tokens: Tokens
    stages: int
    bits: dict[str, float]

    @property
    def stage_count(self) -> int:
        """Return the number of stages of the tokens."""
        return stage_count(SCHEDULES[self.header.schedule], *self.tokens.shape)

    def _repr_html_(self) -> str:
        """Return a table for notebooks, where the tokens would fill the screen."""
        header, (height, width) = self.header, self.tokens.shape
        rows = {
            "picture": f"{header.width}×{header.height}",
            "rate": self.rate.name,
            "tokens": f"{width}×{height}, {self.rate.codebook_size} codes",
            "schedule": f"{SCHEDULES[header.schedule]}, {self.stages} of {self.stage_count} stages",
            "caption": self.caption or "none",
        }
        cells = (f"<tr><th>{name}</th><td>{escape(rows[name])}</td></tr>" for name in rows)
        return f"<table>{''.join(cells)}</table>"


class Codec:
    """A compressor and decompressor of pictures with one model.

    Args:
        model: the float networks; its folder also holds the entropy models.
        captions: folder of the caption model, by default the embedded one; None for none.
    """

    def __init__(self, model: Backbone, captions: Path | None = CAPTIONS) -> None:
        if not isinstance(model, Backbone):
            raise TypeError(f"model must be a Backbone, not {model!r}; see Codec.from_pretrained")
        self.model, self._caption_folder = model, captions
        self._captions = remembered(self._load_captions)
        self._entropy = remembered(self._load_entropy)
        self._ids = remembered(self._compute_id)
        self._with_gradients = remembered(self._open_with_gradients)
        self._other_threads = remembered(self._of_threads)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "tiny",
        device: str = "cpu",
        options: BackboneOptions | None = None,
    ) -> Codec:
        """Open a model ("tiny", a folder, "sd3:PATH", …); networks load on first use.

        See ``percov2.models.backbone.open_backbone`` for the arguments.

        Raises:
            ValueError: the model or the device does not exist, or the model rejects an option.
        """
        return cls(open_backbone(name_or_path, device, options))

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process by the model's folder and options; networks load there."""
        model = self.model
        place = model.folder, str(model.device), model.opened_with
        return _reopened, (type(self), *place, self._caption_folder)

    @property
    def config(self) -> ModelConfig:
        """Return the model's config: its rates and defaults."""
        return self.model.config

    def model_id(self, rate_name: str) -> int:
        """Return the id of a rate's tokens, 0..65535, as in bytes 2-3 of a file.

        Raises:
            ValueError: an unknown rate.
        """
        return self._ids(self.config.rate(rate_name).name)

    def _compute_id(self, rate_name: str) -> int:
        rate = self.config.rate(rate_name)
        fingerprint = self._entropy(rate_name).model.fingerprint()
        codebook = self.model.codebook_bytes(rate_name)
        return model_id(rate.token_side, rate.codebook_size, fingerprint, codebook)

    def _load_captions(self) -> CaptionModel | None:
        return None if self._caption_folder is None else CaptionModel.load(self._caption_folder)

    def _load_entropy(self, rate: str) -> TokenCoder:
        folder = self.model.component(f"{rate}/entropy")
        coder = open_coder(folder, str(self.model.device))
        size = coder.model.config.codebook_size
        expected = self.config.rate(rate).codebook_size
        if size != expected:
            raise ValueError(
                f"{folder} codes {size} different tokens, but rate {rate} has a codebook of "
                f"{expected}"
            )
        return coder

    # Compressing ---------------------------------------------------------------------------------

    @overload
    def compress(
        self,
        picture: OnePicture,
        options: EncodeOptions | None = None,
        *,
        caption: str = "",
        **changes: Any,
    ) -> bytes: ...

    @overload
    def compress(
        self,
        picture: Iterable[OnePicture],
        options: EncodeOptions | None = None,
        *,
        caption: Sequence[str] | str = "",
        **changes: Any,
    ) -> list[bytes]: ...

    def compress(
        self,
        picture: OnePicture | Iterable[OnePicture],
        options: EncodeOptions | None = None,
        *,
        caption: str | Sequence[str] = "",
        **changes: Any,
    ) -> bytes | list[bytes]:
        """Compress one picture into a ``.pcv2`` file, or several into a list of files.

        Args:
            picture: one picture (a path, the bytes of an image file, a Pillow image, an array uint8
                [H, W] or [H, W, 3], a tensor [C, H, W]), or several: an array or tensor of rank 4
                or any other iterable. ``percov2.images.to_rgb`` converts colours.
            options: encoding options; None for the defaults.
            caption: a text that guides the decoder and costs bytes, "" for none; for several
                pictures a list with one each.
            changes: fields of ``EncodeOptions`` that replace those of ``options``.

        Raises:
            ValueError: an input that is no picture, an unknown rate or schedule, a caption or
                picture that cannot be stored, a wrong number of captions, options out of range, a
                picture whose first stage exceeds target_bytes, or effort for a model or a picture
                without a search.
            MetricWeightsMissing: effort without LPIPS's weights.

        Warns:
            CoarserRateWarning: target_bytes gave a picture a coarser rate.
            SparseFileWarning: a file of a large plain picture needs ``allow_sparse`` to restore it.

        >>> codec = Codec.from_pretrained("tiny")
        >>> grey = Image.new("RGB", (64, 48), "grey")
        >>> data = codec.compress(grey, rate="r002")
        >>> codec.decompress(data).size
        (64, 48)
        >>> [len(file) == len(data) for file in codec.compress([grey, grey], rate="r002")]
        [True, True]
        """
        options = options_from(EncodeOptions, options, changes)
        one, pictures = as_pictures(picture)
        files = self._compress(pictures, _captions_of(caption, one, len(pictures)), options)
        return files[0] if one else files

    def _compress(
        self, pictures: Sequence[Any], captions: Sequence[str], options: EncodeOptions
    ) -> list[bytes]:
        point, name = self._rate(options.rate), self._schedule(options.schedule)
        coded = self._coded(captions)
        arrays = _arrays(pictures, options.max_pixels)
        sizes = [(array.shape[0], array.shape[1]) for array in arrays]

        def encode(rate: Rate, chosen: Sequence[int]) -> list[bytes]:
            """Encode the pictures with these indices at a rate."""
            coder = self._entropy(rate.name)
            picked, coded_here = [sizes[i] for i in chosen], [coded[i] for i in chosen]
            headers = self._headers(rate, name, picked, coded_here, options)
            choice = TokenChoice(coder, name, options.slack) if options.slack else None
            search = None
            if options.effort:
                run = self._search(rate.name, options.effort)
                search = CaptionedSearch(run, [captions[i] for i in chosen])
            tokens = token_maps(self.model, [arrays[i] for i in chosen], rate, choice, search)
            if options.target_bytes is None:
                return self._pack(headers, tokens)
            pictures = tokens_file.encode(coder, headers, tokens, self._caption_model(headers))
            limit, seed = options.target_bytes, options.draw_seed
            return tokens_file.write_within(pictures, limit, seed, chosen)

        if options.target_bytes is None:
            return encode(point, range(len(arrays)))
        rates = [point, *self.config.coarser(point)]
        return encode_bounded(encode, sizes, rates, SCHEDULES.index(name))

    def compress_many(
        self,
        inputs: Iterable[Any],
        options: EncodeOptions | None = None,
        *,
        load: Callable[[Any], OnePicture] | None = None,
        caption: CaptionSource = "",
        jobs: int | None = None,
        batch_size: int | None = None,
        **changes: Any,
    ) -> Iterator[Outcome[bytes]]:
        """Compress the pictures of an iterable, which may be endless; yield outcomes in order.

        Pictures are read, converted and coded in threads, a few ahead of the outcome that is taken
        next. A picture that cannot be compressed gives an outcome with the error. The bytes are
        those of ``compress``.

        Args:
            inputs: pictures, each as for ``compress``, or what ``load`` takes.
            options: encoding options; None for the defaults.
            load: a function from an input to a picture, which runs in threads.
            caption: a text for all pictures, an iterable of one text each, or a captioner: a
                function from Pillow images to one text each.
            jobs: number of pictures in work at the same time; None for all cores. More need more
                memory.
            batch_size: number of pictures per call of the networks; None for 1 on the CPU, where
                batches are not faster, and 32 elsewhere.
            changes: fields of ``EncodeOptions`` that replace those of ``options``.

        Raises:
            ValueError: an unknown rate or schedule, or options, jobs or batch_size out of range.

        >>> codec = Codec.from_pretrained("tiny")
        >>> pictures = [Image.new("RGB", (64, 48), name) for name in ("grey", "navy")]
        >>> all(one.get() == codec.compress(picture, rate="r002") for one, picture in
        ...     zip(codec.compress_many(pictures, rate="r002"), pictures))
        True
        """
        options = options_from(EncodeOptions, options, changes)
        self._rate(options.rate), self._schedule(options.schedule)
        return compress_many(self, inputs, options, load, caption, jobs, batch_size)

    def with_threads(self, threads: int) -> Codec:
        """Return a codec of the same model whose networks use a number of threads.

        Returns the codec itself if it uses as many, or if its runtime has no such setting.
        """
        other = self._other_threads(threads)
        return self if other is None else other

    def _of_threads(self, threads: int) -> Codec | None:
        model = self.model.with_threads(threads)
        return None if model is self.model else type(self)(model, self._caption_folder)

    def _search(self, rate: str, rounds: int) -> ArraySearch:
        """Return a search for tokens, which needs gradients: torch, whatever the runtime."""
        require("torch", "effort", "torch", "diffusers", "transformers")
        from percov2.models.tiny.torch.token_search import TokenSearch

        return TokenSearch(self._with_gradients(), rate, rounds).of_array

    def _open_with_gradients(self) -> Backbone:
        if self.config.backbone != "tiny" or str(self.model.device) != "cpu":
            return self.model
        return open_backbone(self.model.folder, "cpu", BackboneOptions(runtime="torch"))

    def encode_tokens(
        self,
        pictures: Iterable[OnePicture],
        rate: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Tokens]:
        """Return the tokens of pictures: one int32 [h, w] each, h = ceil(height / token side).

        Every place takes the nearest code. A picture's tokens do not depend on its batch. Arguments
        and errors as for ``compress``.
        """
        options = EncodeOptions(rate=rate, max_pixels=max_pixels)
        arrays = _arrays(as_pictures(pictures)[1], options.max_pixels)
        return token_maps(self.model, arrays, self._rate(options.rate))

    def pack(
        self,
        tokens: Sequence[Tokens],
        sizes: Sequence[tuple[int, int]],
        options: EncodeOptions | None = None,
        *,
        caption: str | Sequence[str] = "",
        **changes: Any,
    ) -> list[bytes]:
        """Write token maps as files; the same tokens give the same bytes everywhere.

        Args:
            tokens: one integer [h, w] per picture, values in the rate's codebook.
            sizes: (height, width) of each picture in pixels; h and w are these divided by the token
                side, rounded up.
            options: encoding options, of which rate, schedule, stages and draw_seed apply.
            caption, changes: as for ``compress``.

        Raises:
            ValueError: tokens that do not match, or as for ``compress``.
        """
        options = options_from(EncodeOptions, options, changes)
        point, name = self._rate(options.rate), self._schedule(options.schedule)
        if options.target_bytes is not None or options.effort or options.slack:
            raise ValueError("pack chooses no tokens: leave out target_bytes, effort and slack")
        tokens, sizes = _listed("tokens", tokens), _listed("sizes", sizes)
        texts = _captions_of(caption, False, len(tokens))
        if len(sizes) != len(tokens):
            raise ValueError(f"{len(sizes)} sizes for {len(tokens)} token maps; give one per map")
        sizes = [_size(size) for size in sizes]
        maps = [
            tokens_file.checked_tokens(grid, size, point.token_side, point.codebook_size)
            for grid, size in zip(tokens, sizes, strict=True)
        ]
        return self._pack(self._headers(point, name, sizes, self._coded(texts), options), maps)

    def _pack(self, headers: Sequence[Header], tokens: Sequence[Tokens]) -> list[bytes]:
        if not headers:
            return []
        coder = self._entropy(self.config.rates[headers[0].rate].name)
        return tokens_file.pack(coder, headers, tokens, self._caption_model(headers))

    def _caption_model(self, headers: Iterable[Header]) -> CaptionModel | None:
        """Return the caption model if a header needs it, else None."""
        needed = any(header.caption_codec == bitstream.CAPTION_MODEL for header in headers)
        return self._captions() if needed else None

    def _rate(self, name: str | None) -> Rate:
        return self.config.rate(self.config.default_rate if name is None else name)

    def _schedule(self, name: str | None) -> str:
        chosen = self.config.default_schedule if name is None else name
        check_name(chosen)
        return chosen

    def _coded(self, captions: Sequence[str]) -> list[tuple[int, bytes]]:
        """Return the codec and the bytes of every caption."""
        model = self._captions() if any(captions) else None
        return [encode_caption(text, model.bits if model else None) for text in captions]

    def _headers(
        self,
        rate: Rate,
        schedule: str,
        sizes: Sequence[tuple[int, int]],
        captions: Sequence[tuple[int, bytes]],
        options: EncodeOptions,
    ) -> list[Header]:
        index = self.config.rates.index(rate)
        common = Header(self.model_id(rate.name), 1, 1, index, SCHEDULES.index(schedule))
        stages, seed = options.stages, options.draw_seed
        return tokens_file.headers(common, sizes, rate.token_side, captions, stages, seed)

    # Decompressing -------------------------------------------------------------------------------

    @overload
    def decompress(
        self, file: OneFile, options: DecodeOptions | None = None, **changes: Any
    ) -> Image.Image: ...

    @overload
    def decompress(
        self, file: Iterable[OneFile], options: DecodeOptions | None = None, **changes: Any
    ) -> list[Image.Image]: ...

    def decompress(
        self,
        file: OneFile | Iterable[OneFile],
        options: DecodeOptions | None = None,
        **changes: Any,
    ) -> Image.Image | list[Image.Image]:
        """Restore the picture of a ``.pcv2`` file, or a list of pictures for several; mode RGB.

        Args:
            file: the bytes of a file or its path, or an iterable of several.
            options: decoding options; None for the defaults.
            changes: fields of ``DecodeOptions`` that replace those of ``options``.

        Raises:
            BitstreamError: an invalid file; nothing is painted. With several files the message
                names the index of the faulty one.
            ValueError: an input that is no file, options out of range, or realism for a model
                without a dial.
            OSError: a path that cannot be read.
        """
        options = options_from(DecodeOptions, options, changes)
        self.config.chosen_realism(self.config.default_rate, options.realism)
        one, files = as_files(file)
        images = self.paint(self.decode(files, options), options)
        return images[0] if one else images

    def decompress_many(
        self,
        inputs: Iterable[Any],
        options: DecodeOptions | None = None,
        *,
        load: Callable[[Any], OneFile] | None = None,
        jobs: int | None = None,
        batch_size: int | None = None,
        **changes: Any,
    ) -> Iterator[Outcome[Image.Image]]:
        """Restore the files of an iterable, which may be endless; yield outcomes in order.

        A file that cannot be restored gives an outcome with the error. Arguments and ValueError as
        for ``compress_many`` and ``decompress``.
        """
        options = options_from(DecodeOptions, options, changes)
        self.config.chosen_realism(self.config.default_rate, options.realism)
        return decompress_many(self, inputs, options, load, jobs, batch_size)

    def decode_tokens(
        self, files: Sequence[bytes], options: DecodeOptions | None = None, **changes: Any
    ) -> list[Tokens]:
        """Return the tokens of files, int32 [h, w] each, the same on every machine.

        Arguments and BitstreamError as for ``decode``.
        """
        return [file.tokens for file in self.decode(files, options, **changes)]

    def decode(
        self, files: Sequence[bytes], options: DecodeOptions | None = None, **changes: Any
    ) -> list[DecodedFile]:
        """Decode and check the headers, captions and tokens of files.

        Args:
            files: as for ``decompress``; one file gives a list, too.
            options: decoding options, of which max_pixels, allow_truncated and allow_sparse
                apply.
            changes: as for ``decompress``.

        Raises:
            BitstreamError: as for ``decompress``.
        """
        options = options_from(DecodeOptions, options, changes)
        files = as_files(files)[1]
        opened: list[OpenFile] = []
        for i, data in enumerate(files):
            label = f"file {i} of {len(files)}: " if len(files) > 1 else ""
            try:
                opened.append(self._open(data, label, options.max_pixels))
            except BitstreamError as error:
                raise BitstreamError(f"{label}{error}") from error
        captions = self._caption_model(file.parsed.header for file in opened)
        opened = tokens_file.with_captions(opened, captions)
        found: dict[int, tuple[Tokens, int]] = {}
        for index, rate in enumerate(self.config.rates):
            members = [i for i, file in enumerate(opened) if file.parsed.header.rate == index]
            if members:
                coder, chosen = self._entropy(rate.name), [opened[i] for i in members]
                sparse = options.allow_sparse
                if options.allow_truncated:
                    parts = tokens_file.unpack_cut(coder, chosen, captions, sparse)
                else:
                    grids = tokens_file.unpack(coder, chosen, captions, sparse)
                    parts = [(g, f.stages_held) for g, f in zip(grids, chosen, strict=True)]
                found.update(zip(members, parts, strict=True))
        decoded: list[DecodedFile] = []
        for i, file in enumerate(opened):
            header = file.parsed.header
            try:
                caption = decode_caption(header.caption_codec, header.caption)
            except BitstreamError as error:
                raise file.fault(str(error)) from error
            rate = self.config.rates[header.rate]
            decoded.append(DecodedFile(header, rate, caption, *found[i], file.parsed.bits))
        return decoded

    def paint(
        self, decoded: Sequence[DecodedFile], options: DecodeOptions | None = None, **changes: Any
    ) -> list[Image.Image]:
        """Paint the pictures of decoded files: the second half of ``decompress``.

        The CPU paints one picture at a time: batches are no faster there, and a picture then never
        depends on its batch. Arguments and ValueError as for ``decompress``.
        """
        options = options_from(DecodeOptions, options, changes)
        decoded = _listed("decoded", decoded)
        if wrong := [one for one in decoded if not isinstance(one, DecodedFile)]:
            raise ValueError(f"decoded must be results of decode, not {type(wrong[0]).__name__}")
        strength = self.config.guidance if options.guidance is None else options.guidance

        def paint_equal(group: list[DecodedFile]) -> list[Image.Image]:
            tokens = np.stack([file.tokens for file in group])
            rate = group[0].rate.name
            evaluations = options.steps or self.config.default_steps(rate)
            captions = [file.caption for file in group]
            pictures = self.model.pictures(
                tokens, rate, captions, evaluations, strength, options.seed, options.realism
            )
            cut = (
                picture[: file.header.height, : file.header.width]
                for picture, file in zip(pictures, group, strict=True)
            )
            return [Image.fromarray(np.ascontiguousarray(picture)) for picture in cut]

        alone = str(self.model.device) == "cpu"
        sizes = [TOKENS_AT_ONCE if alone else file.tokens.size for file in decoded]
        keys = [(file.rate.name, file.tokens.shape) for file in decoded]
        return by_group(decoded, keys, sizes, paint_equal)

    def _open(self, data: bytes, label: str, max_pixels: int) -> OpenFile:
        """Read a header and check that it fits this model; errors omit the label."""
        parsed = bitstream.read(data, max_pixels)
        header = parsed.header
        rates = [rate.name for rate in self.config.rates]
        check_model(header, self.config.name, rates, [self.model_id(name) for name in rates])
        side = self.config.rates[header.rate].token_side
        return OpenFile(
            data, parsed, tokens_file.token_grid((header.height, header.width), side), label
        )


def _reopened(
    kind: type[Codec], folder: Path, device: str, options: BackboneOptions, captions: Path | None
) -> Codec:
    return kind(open_backbone(folder, device, options), captions)


def _arrays(pictures: Sequence[Any], max_pixels: int) -> list[NDArray[np.uint8]]:
    """Return pictures as uint8 [H, W, 3]; a ValueError names the index of the faulty one."""
    arrays = []
    for i, picture in enumerate(pictures):
        try:
            arrays.append(rgb_array(picture, max_pixels))
        except ValueError as error:
            if len(pictures) == 1:
                raise
            raise ValueError(f"picture {i} of {len(pictures)}: {error}") from error
    return arrays


def _listed(name: str, values: Any) -> list[Any]:
    """Return an iterable as a list; ValueError for anything else."""
    if isinstance(values, (str, bytes, DecodedFile)) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list, not {type(values).__name__}")
    return list(values)


def _size(size: Any) -> tuple[int, int]:
    """Return (height, width) in pixels as plain numbers; ValueError for anything else."""
    try:
        height, width = (-1 if isinstance(side, bool) else operator.index(side) for side in size)
    except (TypeError, ValueError):
        height, width = -1, -1
    if min(height, width) < 1:
        raise ValueError(f"a size must be (height, width) in whole pixels from 1, not {size!r}")
    return height, width


def _captions_of(caption: str | Sequence[str], one: bool, count: int) -> list[str]:
    """Return one caption per picture; ValueError for a wrong number or type."""
    if one:
        if not isinstance(caption, str):
            raise ValueError(f"caption must be a text for one picture, not {caption!r}")
        return [caption]
    if isinstance(caption, str):
        if caption:
            raise ValueError(f"caption must be a list of {count} texts, one each, not one text")
        return [""] * count
    if not isinstance(caption, (list, tuple)) or not all(isinstance(one, str) for one in caption):
        raise ValueError(
            f"caption must be a list of {count} texts, one each, not {type(caption).__name__}"
        )
    if len(caption) != count:
        raise ValueError(f"caption has {len(caption)} texts for {count} pictures; give one each")
    return list(caption)
