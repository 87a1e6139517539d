"""The codec: pictures -> files -> pictures, the one road that every user of percov2 takes.

Compressing: picture -> tokens (float networks) -> intervals (one pass of the integer transformer)
-> rANS. Decompressing: header -> tokens, stage by stage -> check -> and only then the flow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from percov2 import bitstream, packing, unpacking
from percov2.bitstream import MAX_PIXELS, BitstreamError, Header
from percov2.caption import decode_caption, encode_caption
from percov2.caption_model import CaptionModel
from percov2.coarser_rates import encode_bounded
from percov2.entropy.int_transformer import IntTransformer
from percov2.entropy.schedule import SCHEDULES
from percov2.entropy.token_coder import TokenCoder
from percov2.model_ids import check_model, model_id
from percov2.models.backbone import Backbone, BackboneOptions, open_backbone
from percov2.models.model_config import ModelConfig, Rate
from percov2.packing import Tokens
from percov2.tokenizing import CaptionedSearch, TokenChoice, rgb_arrays, token_maps
from percov2.unpacking import DecodedFile, OpenFile

CAPTIONS = Path(__file__).parent / "pretrained" / "captions"
"""The embedded caption model. Files name it by the caption codec, so it never changes."""


class Codec:
    """Compresses and restores pictures with one model.

    Args:
        model: the float networks; the entropy models lie in the same folder.
        captions: folder of the model that codes captions; None for none. All models share the
            embedded one.
    """

    def __init__(self, model: Backbone, captions: Path | None = CAPTIONS) -> None:
        self.model, self._caption_folder = model, captions
        self._captions = lru_cache(None)(self._load_captions)
        self._entropy = lru_cache(None)(self._load_entropy)
        self._ids = lru_cache(None)(self._compute_id)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path = "tiny",
        device: str = "cpu",
        options: BackboneOptions | None = None,
    ) -> Codec:
        """Open a model ("tiny", a folder, "sd3:PATH", …); networks load when first needed.

        Arguments as for ``percov2.models.backbone.open_backbone``.

        Raises:
            ValueError: no such model or device, or options that the model does not take.
        """
        return cls(open_backbone(name_or_path, device, options))

    @property
    def config(self) -> ModelConfig:
        """The model's config: its rates and defaults."""
        return self.model.config

    def model_id(self, rate_name: str) -> int:
        """The id of the tokens of a rate, 0..65535, as in a file's bytes 2-3.

        Raises:
            ValueError: unknown rate.
        """
        return self._ids(rate_name)

    def _compute_id(self, rate_name: str) -> int:
        rate = self.config.rate(rate_name)
        fingerprint = self._entropy(rate_name).model.fingerprint()
        return model_id(rate, fingerprint, self.model.codebook_bytes(rate_name))

    def _load_captions(self) -> CaptionModel | None:
        return None if self._caption_folder is None else CaptionModel.load(self._caption_folder)

    def _load_entropy(self, rate: str) -> TokenCoder:
        folder = self.model.folder / rate / "entropy"
        transformer = IntTransformer.load(folder, self.model.device)
        expected = self.config.rate(rate).codebook_size
        if transformer.config.codebook_size != expected:
            raise ValueError(
                f"{folder} codes {transformer.config.codebook_size} different tokens, but rate "
                f"{rate} has a codebook of {expected}"
            )
        return TokenCoder(transformer)

    # Compressing ---------------------------------------------------------------------------------

    def compress(
        self,
        images: Sequence[Image.Image],
        rate: str | None = None,
        schedule: str | None = None,
        captions: Sequence[str] | None = None,
        max_pixels: int = MAX_PIXELS,
        slack: float = 0.0,
        stages: int | None = None,
        target_bytes: int | None = None,
        effort: int = 0,
        draw_seed: int = 0,
    ) -> list[bytes]:
        """Compress pictures of any modes and sizes into ``.pcv2`` files.

        Args:
            images: see ``percov2.images.to_rgb`` for what happens to their colours.
            rate: name of a rate; the model's default if None.
            schedule: name of an entropy schedule; the model's default if None.
            captions: one text per image, "" for none; texts guide the decoder and cost bytes.
            max_pixels: refuse pictures with more pixels.
            slack: 0 to 2; above 0 a place takes, of its 16 nearest codes, the likeliest whose
                cosine similarity is at most so much below the nearest one's. Stages are decided
                one after the other.
            stages: hold the tokens of so many stages, at least 1; the decoder draws the others
                (the paper's hybrid mode). None, or all of a picture's: a complete file.
            target_bytes: hold as many stages as so many bytes have room for. Where the complete
                file is longer and readers accept no part of so many tokens, the picture takes the
                finest coarser rate that has a file of so many bytes.
            effort: 0 to 1000 rounds of a search for tokens that paint the picture better; each
                takes as long as decoding it about three times, and 16 bring most of the gain.
            draw_seed: 0 to 65535, of the decoder's draws for files that do not hold all stages;
                others than 0 cost two or three bytes.

        Raises:
            ValueError: unknown rate or schedule, a caption or picture that cannot be stored, a
                wrong number of captions, slack, stages, effort or draw_seed out of range, both
                stages and target_bytes, a draw_seed without either, a picture of which one stage
                needs more than target_bytes, stages of a picture with more tokens than a file may
                hold in part, or effort for a model or a picture that has no search.
            MetricWeightsMissing: effort, and LPIPS's weights are not installed.

        Warns:
            CoarserRateWarning: a picture has a coarser rate because of target_bytes.
        """
        if stages is not None and target_bytes is not None:
            raise ValueError("stages and target_bytes exclude each other; give one")
        if draw_seed and stages is None and target_bytes is None:
            raise ValueError(
                f"draw_seed {draw_seed} without stages or target_bytes: nothing is drawn"
            )
        for name, value, most in (
            ("slack", slack, 2),
            ("effort", effort, 1000),
            ("draw_seed", draw_seed, bitstream.MAX_SEED),
        ):
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be 0 to {most}, not {value}")
        point, name = self._rate(rate), self._schedule(schedule)
        coded = self._coded_captions(captions, len(images))
        texts = [""] * len(images) if captions is None else captions
        arrays = rgb_arrays(images, max_pixels)
        sizes = [(array.shape[0], array.shape[1]) for array in arrays]

        def encode(rate: Rate, chosen: Sequence[int]) -> list[bytes]:
            """Files, at a rate, of the pictures of these numbers."""
            coder, common = self._entropy(rate.name), self._common(rate, name)
            picked, coded_here = [sizes[i] for i in chosen], [coded[i] for i in chosen]
            headers = packing.headers(
                common, picked, rate.token_side, coded_here, stages, draw_seed
            )
            choice = TokenChoice(coder, name, slack) if slack else None
            search = None
            if effort:
                run = self.model.token_search(rate.name, effort)
                search = CaptionedSearch(run, [texts[i] for i in chosen])
            tokens = token_maps(self.model, [arrays[i] for i in chosen], rate, choice, search)
            if target_bytes is None:
                return self._pack(headers, tokens)
            model = self._caption_model(headers)
            pictures = packing.encode(coder, headers, tokens, model)
            return packing.write_within(pictures, target_bytes, draw_seed, chosen)

        if target_bytes is None:
            return encode(point, range(len(arrays)))
        rates = [point, *self.config.coarser(point)]
        return encode_bounded(encode, sizes, rates, SCHEDULES.index(name))

    def encode_tokens(
        self,
        images: Sequence[Image.Image],
        rate: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> list[Tokens]:
        """Tokens of pictures: one int32 [h, w] per image, h = ceil(height / token side).

        Every place takes the nearest code. A picture's tokens do not depend on its neighbours in
        the batch. Arguments and errors as for ``compress``.
        """
        return token_maps(self.model, rgb_arrays(images, max_pixels), self._rate(rate))

    def pack(
        self,
        tokens: Sequence[Tokens],
        sizes: Sequence[tuple[int, int]],
        rate: str | None = None,
        schedule: str | None = None,
        captions: Sequence[str] | None = None,
        stages: int | None = None,
    ) -> list[bytes]:
        """Write token maps as files; the same tokens give the same bytes everywhere.

        Args:
            tokens: one integer [h, w] per image, values in the rate's codebook.
            sizes: (height, width) of each image in pixels; h and w are those divided by the token
                side, rounded up.
            rate, schedule, captions, stages: as for ``compress``.

        Raises:
            ValueError: tokens that do not fit, or as for ``compress``.
        """
        point, name = self._rate(rate), self._schedule(schedule)
        coded = self._coded_captions(captions, len(tokens))
        if len(sizes) != len(tokens):
            raise ValueError(f"{len(sizes)} sizes for {len(tokens)} token maps; give one per map")
        maps = [
            packing.checked_tokens(grid, size, point.token_side, point.codebook_size)
            for grid, size in zip(tokens, sizes, strict=True)
        ]
        common = self._common(point, name)
        headers = packing.headers(common, sizes, point.token_side, coded, stages)
        return self._pack(headers, maps)

    def _pack(self, headers: Sequence[Header], tokens: Sequence[Tokens]) -> list[bytes]:
        if not headers:
            return []
        coder = self._entropy(self.config.rates[headers[0].rate].name)
        return packing.pack(coder, headers, tokens, self._caption_model(headers))

    def _caption_model(self, headers: Iterable[Header]) -> CaptionModel | None:
        """The caption model, if a header needs it."""
        needed = any(header.caption_codec == bitstream.CAPTION_MODEL for header in headers)
        return self._captions() if needed else None

    def _coded_captions(
        self, captions: Sequence[str] | None, count: int
    ) -> list[tuple[int, bytes]]:
        texts = [""] * count if captions is None else list(captions)
        if isinstance(captions, str) or len(texts) != count:
            raise ValueError(f"captions must be a list of {count} texts, one per image")
        model = self._captions() if any(texts) else None
        return [encode_caption(text, model.bits if model else None) for text in texts]

    def _rate(self, name: str | None) -> Rate:
        return self.config.rate(self.config.default_rate if name is None else name)

    def _schedule(self, name: str | None) -> str:
        chosen = self.config.default_schedule if name is None else name
        if chosen not in SCHEDULES:
            raise ValueError(f"unknown schedule {chosen!r}; choose one of {', '.join(SCHEDULES)}")
        return chosen

    def _common(self, rate: Rate, schedule: str) -> Header:
        """What the headers of files of a rate and schedule share."""
        index = self.config.rates.index(rate)
        return Header(self.model_id(rate.name), 1, 1, index, SCHEDULES.index(schedule))

    # Decompressing -------------------------------------------------------------------------------

    def decompress(
        self,
        files: Sequence[bytes],
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        max_pixels: int = MAX_PIXELS,
        allow_truncated: bool = False,
        realism: float | None = None,
    ) -> list[Image.Image]:
        """Restore pictures, mode RGB.

        Args:
            files: ``.pcv2`` files made with this model.
            steps: flow evaluations, at least 1; the model's default if None.
            guidance: classifier-free guidance on the caption, 0 to 100; the model's default if
                None.
            seed: of the starting noise, 0 to 2^63 - 1.
            max_pixels: refuse files that declare more pixels.
            allow_truncated: of a file that lacks its end take the stages that are whole, and draw
                the others. Nothing protects such a file from damage in what is left of it.
            realism: 0 (faithful) to 1 (realistic); the rate's default if None.

        Raises:
            BitstreamError: a file is not valid; nothing is painted then. With several files the
                message names the index of the faulty one.
            ValueError: steps, guidance, seed or realism out of range, or realism for a model
                without a dial.
        """
        self._check_sampling(steps, guidance, seed, realism)
        decoded = self.decode(files, max_pixels, allow_truncated)
        return self.paint(decoded, steps, guidance, seed, realism)

    def decode_tokens(self, files: Sequence[bytes], max_pixels: int = MAX_PIXELS) -> list[Tokens]:
        """Tokens of files, int32 [h, w] each, the same on every machine.

        Raises BitstreamError as ``decompress`` does.
        """
        return [file.tokens for file in self.decode(files, max_pixels)]

    def decode(
        self,
        files: Sequence[bytes],
        max_pixels: int = MAX_PIXELS,
        allow_truncated: bool = False,
    ) -> list[DecodedFile]:
        """Headers, captions and tokens of files, checked.

        Arguments and BitstreamError as for ``decompress``.
        """
        opened: list[OpenFile] = []
        for i, data in enumerate(files):
            label = f"file {i} of {len(files)}: " if len(files) > 1 else ""
            try:
                opened.append(self._open(bytes(data), label, max_pixels))
            except BitstreamError as error:
                raise BitstreamError(f"{label}{error}") from error
        captions = self._caption_model(file.parsed.header for file in opened)
        opened = unpacking.with_captions(opened, captions)
        found: dict[int, tuple[Tokens, int]] = {}
        for index, rate in enumerate(self.config.rates):
            members = [i for i, file in enumerate(opened) if file.parsed.header.rate == index]
            if members:
                coder, chosen = self._entropy(rate.name), [opened[i] for i in members]
                if allow_truncated:
                    parts = unpacking.unpack_cut(coder, chosen, captions)
                else:
                    grids = unpacking.unpack(coder, chosen, captions)
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
        self,
        decoded: Sequence[DecodedFile],
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        realism: float | None = None,
    ) -> list[Image.Image]:
        """The second half of ``decompress``: tokens and captions -> pictures.

        On the CPU pictures are painted one at a time: a batch gains nothing there, and alone a
        picture is the same in any company. Arguments and ValueError as for ``decompress``.
        """
        self._check_sampling(steps, guidance, seed, realism)
        strength = self.config.guidance if guidance is None else guidance

        def paint_equal(group: list[DecodedFile]) -> list[Image.Image]:
            tokens = torch.from_numpy(np.stack([file.tokens for file in group]))
            rate = group[0].rate.name
            evaluations = self.config.default_steps(rate) if steps is None else steps
            captions = [file.caption for file in group]
            pixels = self.model.reconstruct(
                tokens, rate, captions, evaluations, strength, seed, realism
            )
            levels = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
            arrays = levels.permute(0, 2, 3, 1).cpu().numpy()
            return [
                Image.fromarray(array[: file.header.height, : file.header.width].copy())
                for array, file in zip(arrays, group, strict=True)
            ]

        alone = torch.device(self.model.device).type == "cpu"
        sizes = [packing.TOKENS_AT_ONCE if alone else file.tokens.size for file in decoded]
        keys = [(file.rate.name, file.tokens.shape) for file in decoded]
        return packing.by_group(decoded, keys, sizes, paint_equal)

    def _check_sampling(
        self, steps: int | None, guidance: float | None, seed: int, realism: float | None
    ) -> None:
        if steps is not None and not 1 <= steps <= 1000:
            raise ValueError(f"steps must be 1 to 1000, not {steps}")
        if guidance is not None and not 0 <= guidance <= 100:
            raise ValueError(f"guidance must be 0 to 100, not {guidance}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be 0 to 2^63 - 1, not {seed}")
        self.config.chosen_realism(self.config.default_rate, realism)

    def _open(self, data: bytes, label: str, max_pixels: int) -> OpenFile:
        """Read a header and compare it with this model; BitstreamError (without the label)."""
        parsed = bitstream.read(data, max_pixels)
        header = parsed.header
        check_model(header, self.config, self.model_id)
        side = self.config.rates[header.rate].token_side
        return OpenFile(
            data, parsed, packing.token_grid((header.height, header.width), side), label
        )
