"""The backbone "tiny" on ONNX Runtime: a small autoencoder and flow transformer on the CPU.

Compressing never loads the flow; decompressing never loads the encoders.
``percov2.models.tiny.torch`` has the same networks as torch modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tqdm import tqdm

from percov2._native import instruction_sets
from percov2.caching import remembered
from percov2.images import from_unit_range
from percov2.models.backbone import Backbone
from percov2.models.config import LATENT_SIDE, PREDICTIONS, ModelConfig, read_config
from percov2.models.stored_tensors import read_network
from percov2.models.tiny.captions import caption_rows
from percov2.models.tiny.graphs import Graph
from percov2.models.windows import Windows, sample, whole_patches, window_side

__all__ = ["TinyModel", "draw_noise", "position_table"]

Array = NDArray[np.float32]
_WINDOWS_AT_ONCE = 8
"""Windows per call of the flow, which bound the memory."""
_FLOW_SETTINGS = (
    *("patch_size", "out_channels", "sample_size", "pos_embed_max_size"),
    *("num_attention_heads", "attention_head_dim"),
)
_ENCODED, _REDUCED = 160, 256
"""Largest sides in latents that encoder and hyper-encoder see at once, which bound the memory."""
_TILE = 176
"""Largest side in latents that the decoder sees at once, which bounds the memory."""


def draw_noise(shape: tuple[int, int, int], seed: int) -> Array:
    """Return the starting noise and the decoder's noise, float32 [2, C, h, w].

    ``shape`` is [C, h, w]. Both are normal with variance 1, the same for every runtime.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal((2, *shape), np.float32)


def window_sides(
    config: ModelConfig, rate: str, sides: tuple[int, int], patch: int
) -> tuple[int, int]:
    """Return the sides of the windows of the flow for latents of (height, width).

    In windows of any of these sides, tokens have the same places in the flow's table of positions,
    which is cut around its centre in patches of ``patch`` latents.
    """
    ratio = config.rate(rate).token_side // LATENT_SIDE
    unit = patch if ratio <= patch else 2 * ratio
    height, width = (window_side(n, config.window, config.overlap, unit) for n in sides)
    return height, width


def position_table(width: int, side: int, base_side: int) -> Array:
    """Return SD3's table of sinusoids of positions, float32 [1, side², width].

    Args:
        width: channels of a patch.
        side: largest number of patches a side.
        base_side: number of patches a side whose positions are whole numbers.
    """
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(side)[:, None] * (base_side / side) * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    rows = np.broadcast_to(waves[:, None], (side, side, width // 2))
    columns = np.broadcast_to(waves[None], (side, side, width // 2))
    return np.concatenate([columns, rows], 2).reshape(1, side * side, width).astype(np.float32)


def _pixels(begin: int, end: int) -> slice:
    return slice(LATENT_SIDE * begin, LATENT_SIDE * end)


def _hyper_reach(ratio: int) -> int:
    """Return the number of tokens to each side that a hyper-latent depends on.

    The hyper-encoder has three parts, with 3, 6 and 6 convolutions of 3×3. A convolution of 5×5
    that halves the resolution comes before each of the last parts (``HyperEncoder``).
    """
    reach, size = 0, 1
    for least, convolutions in ((8, 3), (4, 6), (2, 6)):
        if ratio >= least:
            reach += 2 * size
            size *= 2
        reach += convolutions * size
    return -(-reach // ratio)


def _by_tiles(
    network: Callable[[Array], Array], values: Array, unit: int, reach: int, tile: int
) -> Array:
    """Run a convolutional network, which gives a position per unit, on tiles of a large input.

    A tile has all values that its positions depend on, so that the result is that of the whole.

    Args:
        network: a function from [1, C, H, W] to [1, D, H / unit, W / unit].
        values: its input.
        unit: values per side of a position.
        reach: positions to each side that a position depends on.
        tile: largest side in positions of an input that is not cut.
    """
    rows, columns = (side // unit for side in values.shape[2:])
    if max(rows, columns) <= tile:
        return network(values)
    step = max(1, tile - 2 * reach)
    result = np.empty(0, np.float32)
    for top, left in product(range(0, rows, step), range(0, columns, step)):
        above, before = max(0, top - reach), max(0, left - reach)
        cut_rows = slice(above * unit, (top + step + reach) * unit)
        cut_columns = slice(before * unit, (left + step + reach) * unit)
        part = network(np.ascontiguousarray(values[:, :, cut_rows, cut_columns]))
        if not result.size:
            result = np.empty((1, part.shape[1], rows, columns), np.float32)
        place = result[:, :, top : top + step, left : left + step]
        begin_row, begin_column = top - above, left - before
        place[:] = part[:, :, begin_row:, begin_column:][:, :, : place.shape[2], : place.shape[3]]
    return result


def _progress(parts: Any, description: str, unit: str) -> Any:
    """Return the parts, with a progress bar on terminals if they take longer than two seconds."""
    return tqdm(parts, description, unit=unit, delay=2, leave=False, disable=None)


@dataclass(frozen=True)
class _Condition:
    """The flow's input z_hat: a vector per token, repeated over the latents of the token.

    Attributes:
        projected: float32 [V, C], the vector of every code.
        tokens: [B, h, w].
        ratio: latents per side of a token.
    """

    projected: Array
    tokens: NDArray[Any]
    ratio: int

    @property
    def sides(self) -> tuple[int, int]:
        height, width = self.tokens.shape[-2:]
        return height * self.ratio, width * self.ratio

    def at(self, b: int, ys: slice, xs: slice) -> Array:
        """Return a window, float32 [C, rows, columns]; the last latents repeat beyond the end."""
        rows, columns = (
            np.minimum(np.arange(cut.start, cut.stop) // self.ratio, count - 1)
            for cut, count in zip((ys, xs), self.tokens.shape[-2:], strict=True)
        )
        window: Array = self.projected[self.tokens[b][np.ix_(rows, columns)]].transpose(2, 0, 1)
        return window


class TinyModel(Backbone):
    """The small networks of a model folder, whose layout is in docs/reference/model-folder.md.

    Args:
        folder: the model's folder.
        threads: threads of a network.
        dtype: "int8" or "fp32" for the decoder's convolutions; None for "int8" if the folder has
            that graph and the processor multiplies int8 fast (AVX-512 VNNI). All other networks run
            in float32.
    """

    parallel = True

    def __init__(self, folder: Path, threads: int, dtype: str | None = None) -> None:
        super().__init__(folder)
        self.threads = threads
        graph = self.folder / "autoencoder" / "decoder.int8.onnx"
        chosen = "int8" if graph.is_file() and "avx512" in instruction_sets() else "fp32"
        self.dtype = dtype or chosen
        self._encoder = remembered(self._load_encoder)
        self._decoder = remembered(self._load_decoder)
        self._flow = remembered(self._load_flow)
        self._hyper_encoder = remembered(self._load_hyper_encoder)
        self._quantizer = remembered(self._load_quantizer)

    @property
    def runtime(self) -> str:
        """Return the runtime of the networks, as ``Backbone.runtime``."""
        version = onnxruntime.__version__
        return f"onnxruntime {version}, {self.dtype} decoder, {self.threads} threads"

    def with_threads(self, threads: int) -> TinyModel:
        """Return the same model, as ``Backbone.with_threads``."""
        if threads == self.threads:
            return self
        other = TinyModel(self.folder, threads, self.dtype)
        other.opened_with = dataclasses.replace(self.opened_with, threads=threads)
        return other

    # Networks ------------------------------------------------------------------------------------

    def _load_encoder(self) -> Graph:
        return Graph(self.component("autoencoder") / "encoder.onnx", self.threads, "encoder.")

    def _load_decoder(self) -> Graph:
        int8 = self.dtype == "int8"
        name = "decoder.int8.onnx" if int8 else "decoder.onnx"
        return Graph(self.component("autoencoder") / name, self.threads, "decoder.", int8)

    @cached_property
    def _flow_config(self) -> dict[str, Any]:
        return read_config(self.component("flow"), *_FLOW_SETTINGS)

    def _load_flow(self) -> Graph:
        config = self._flow_config
        width = config["num_attention_heads"] * config["attention_head_dim"]
        base_side = config["sample_size"] // config["patch_size"]
        table = position_table(width, config["pos_embed_max_size"], base_side)
        path = self.component("flow") / "graph.onnx"
        return Graph(path, self.threads, extra={"pos_embed.pos_embed": table})

    def _load_hyper_encoder(self, rate: str) -> Graph:
        folder = self.component(f"{self.config.rate(rate).name}/hyper_encoder")
        return Graph(folder / "graph.onnx", self.threads)

    def _load_quantizer(self, rate: str) -> dict[str, Array]:
        point = self.config.rate(rate)
        folder = self.component(f"{point.name}/quantizer")
        tensors = read_network(
            folder / "model.safetensors",
            {
                "codebook": "Vd",
                "usage": "V",
                "project_in.weight": "dM11",
                "project_in.bias": "d",
                "project_out.weight": "Cd11",
                "project_out.bias": "C",
            },
        )
        size = len(tensors["codebook"])
        if size != point.codebook_size:
            raise ValueError(
                f"{folder} has a codebook of {size}, but rate {rate} one of "
                f"{point.codebook_size}: config.json or the folder belongs to another model"
            )
        return tensors

    # Encoding ------------------------------------------------------------------------------------

    def directions(self, images: Array, rate: str) -> Array:
        """Return unit vectors, as ``Backbone.directions``."""
        hyper_encoder, tensors = self._hyper_encoder(rate), self._quantizer(rate)
        weight = tensors["project_in.weight"][:, :, 0, 0].T
        side = self.token_side(images, rate)
        shape = (1, len(weight), images.shape[2] // side, images.shape[3] // side)
        found = []
        for i in range(len(images)):  # alone, so that its company cannot change its tokens
            latents = self._hyper_latents(images[i : i + 1], hyper_encoder, side)
            if latents.shape != shape:
                raise ValueError(
                    f"{self.folder / self.config.rate(rate).name / 'hyper_encoder'} gives "
                    f"{latents.shape}, not {shape}; it belongs to another rate or model"
                )
            projected = latents[0].transpose(1, 2, 0) @ weight + tensors["project_in.bias"]
            length = np.sqrt(np.square(projected).sum(-1, keepdims=True))
            found.append(projected / np.maximum(length, 1e-12))
        return np.stack(found)

    def _hyper_latents(self, image: Array, hyper_encoder: Graph, side: int) -> Array:
        """Return the hyper-latents of one image, [1, M, H/s, W/s]; large images go by tiles."""

        def encode(part: Array) -> Array:
            return self._encoder()(images=part)

        def reduce(part: Array) -> Array:
            return hyper_encoder(latents=part)

        config = read_config(self.component("autoencoder"), "encoder_blocks")
        fine, coarse = config["encoder_blocks"]
        # A block has two 3×3 convolutions; two positions at 1/4 are one latent.
        reach = -(-(2 * fine + 1) // 2) + 2 * coarse
        latents = _by_tiles(encode, image, LATENT_SIDE, reach, _ENCODED)
        ratio = side // LATENT_SIDE
        return _by_tiles(reduce, latents, ratio, _hyper_reach(ratio), _REDUCED // ratio)

    def _similarities(self, direction: Array, rate: str) -> Array:
        similarities: Array = direction @ self._quantizer(rate)["codebook"].T
        return similarities

    def candidates(
        self, directions: Array, rate: str, count: int
    ) -> tuple[NDArray[np.int32], Array]:
        """Return tokens and similarities, as ``Backbone.candidates``."""
        found = []
        for direction in directions:
            similarities = self._similarities(direction, rate)
            order = np.argsort(-similarities, -1, kind="stable")[..., :count]
            found.append((order.astype(np.int32), np.take_along_axis(similarities, order, -1)))
        tokens, values = zip(*found, strict=True)
        return np.stack(tokens), np.stack(values)

    def nearest(self, directions: Array, rate: str) -> NDArray[np.int32]:
        """Return tokens, as ``Backbone.nearest``."""
        each = [self._similarities(direction, rate).argmax(-1) for direction in directions]
        return np.stack(each).astype(np.int32)

    # Painting ------------------------------------------------------------------------------------

    def reconstruct(
        self,
        tokens: NDArray[Any],
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None = None,
    ) -> Array:
        """Return images, as ``Backbone.reconstruct``."""
        side = self.config.rate(rate).token_side
        images = np.empty((len(tokens), 3, *(side * n for n in tokens.shape[-2:])), np.float32)
        latents = self.latents(tokens, rate, captions, steps, guidance, seed, realism)
        for image, one in zip(images, latents, strict=True):
            for ys, xs, part in self._decoded(one[None]):
                place = image[:, ys, xs]
                np.clip(part[0, :, : place.shape[1], : place.shape[2]], -1, 1, out=place)
        return images

    def pictures(
        self,
        tokens: NDArray[Any],
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None = None,
    ) -> NDArray[np.uint8]:
        """Return pictures, as ``Backbone.pictures``, whose float32 values exist tile by tile."""
        side = self.config.rate(rate).token_side
        pictures = np.empty((len(tokens), *(side * n for n in tokens.shape[-2:]), 3), np.uint8)
        latents = self.latents(tokens, rate, captions, steps, guidance, seed, realism)
        for picture, one in zip(pictures, latents, strict=True):
            for ys, xs, part in self._decoded(one[None]):
                place = picture[ys, xs]
                place[:] = from_unit_range(part)[0, : place.shape[0], : place.shape[1]]
        return pictures

    def _decoded(self, latents: Array) -> Iterator[tuple[slice, slice, Array]]:
        """Yield the image of latents [1, 16, h, w] in parts, with their rows and columns.

        A large image has several parts. The decoder sees all latents that the pixels of a part
        depend on, so that it equals the same part of the whole.
        """
        height, width = latents.shape[-2:]
        if max(height, width) <= _TILE:
            yield _pixels(0, height), _pixels(0, width), self._decoder()(latents=latents)
            return
        tiles = [*product(self._tiles(height), self._tiles(width))]
        for (top, bottom), (left, right) in _progress(tiles, "decoding", "tile"):
            above, before = max(0, top - self._reach), max(0, left - self._reach)
            ys, xs = slice(above, bottom + self._reach), slice(before, right + self._reach)
            part = self._decoder()(latents=np.ascontiguousarray(latents[..., ys, xs]))
            inner = _pixels(top - above, bottom - above), _pixels(left - before, right - before)
            yield _pixels(top, bottom), _pixels(left, right), part[:, :, *inner]

    @cached_property
    def _reach(self) -> int:
        """Return the number of latents to each side that a decoded pixel depends on."""
        config = read_config(self.component("autoencoder"), "decoder_blocks")
        coarse, fine = config["decoder_blocks"]
        # A block has two 3×3 convolutions; two positions at 1/4 are one latent.
        return int(1 + 2 * coarse + -(-(2 * fine + 1) // 2))

    def _tiles(self, length: int) -> list[tuple[int, int]]:
        """Return the begins and ends of equal tiles of a side, without what they depend on."""
        count = -(-length // (_TILE - 2 * self._reach))
        bounds = [length * i // count for i in range(count + 1)]
        return list(pairwise(bounds))

    def latents(
        self,
        tokens: NDArray[Any],
        rate: str,
        captions: Sequence[str],
        steps: int,
        guidance: float,
        seed: int,
        realism: float | None = None,
    ) -> Array:
        """Return the decoder's input, float32 [B, 16, h, w] in whole patches of the flow.

        Arguments and errors are those of ``reconstruct``.
        """
        condition = _Condition(self._projected(tokens, rate), tokens, self._ratio(rate))
        patch, channels = self._flow_config["patch_size"], self._flow_config["out_channels"]
        rows, columns = (whole_patches(side, patch) for side in condition.sides)
        windows = Windows.covering(
            (rows, columns),
            window_sides(self.config, rate, (rows, columns), patch),
            self.config.overlap,
        )
        realism = self.config.chosen_realism(rate, realism)
        noise, grain = draw_noise((channels, rows, columns), seed)
        texts = [self._conditioning(captions, realism)]
        if guidance != 1.0 and any(captions):
            texts.append(self._conditioning([""] * len(captions), realism))

        def estimate(noisy: Array, condition: _Condition, t: float) -> Array:
            clean, *without = (self._estimate(noisy, condition, t, text, windows) for text in texts)
            return without[0] + guidance * (clean - without[0]) if without else clean

        start = np.broadcast_to(noise, (len(tokens), *noise.shape))
        latents = sample(estimate, condition, start, steps)
        noisy: Array = latents + np.float32(self.config.grain(rate, realism)) * grain
        return noisy

    def _ratio(self, rate: str) -> int:
        return self.config.rate(rate).token_side // LATENT_SIDE

    def _projected(self, tokens: NDArray[Any], rate: str) -> Array:
        """Return the flow's input for every code, [V, C]; ValueError for tokens out of range."""
        tensors = self._quantizer(rate)
        size, dim = tensors["codebook"].shape
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(f"tokens must lie in 0…{size - 1}")
        codes = tensors["codebook"] * np.float32(dim**0.5)
        projected: Any = codes @ tensors["project_out.weight"][:, :, 0, 0].T
        return np.add(projected, tensors["project_out.bias"])

    @cached_property
    def _words(self) -> dict[str, Array]:
        path = self.component("text_encoder") / "model.safetensors"
        return read_network(path, {"words.weight": "nd", "positions": "ld"})

    @cached_property
    def _dial(self) -> dict[str, Array]:
        shapes = {"layers.0.weight": "wf", "layers.0.bias": "w"}
        shapes |= {"layers.2.weight": "dw", "layers.2.bias": "d"}
        return read_network(self.component("dial") / "model.safetensors", shapes)

    def _conditioning(self, captions: Sequence[str], realism: float) -> tuple[Array, Array]:
        """Return the flow's conditioning: a sequence [B, L, d] and a pooled vector [B, d]."""
        table, positions = self._words["words.weight"], self._words["positions"]
        rows = caption_rows(captions, len(table), len(positions))
        embedded, present = table[rows], (rows > 0)[..., None]
        pooled = (embedded * present).sum(1) / np.maximum(present.sum(1), 1)
        if self.config.realism is not None:
            pooled = pooled + self._offset(realism)
        return embedded + positions, pooled.astype(np.float32)

    def _offset(self, realism: float) -> Array:
        """Return the offset of the pooled vector, as ``percov2.models.tiny.torch.dial``."""
        dial = self._dial
        frequencies = dial["layers.0.weight"].shape[1] // 2
        angles = np.float32(realism * np.pi / 2) * 2 ** np.arange(frequencies, dtype=np.float32)
        hidden = dial["layers.0.weight"] @ np.concatenate([np.sin(angles), np.cos(angles)])
        hidden = hidden + dial["layers.0.bias"]
        hidden = hidden / (1 + np.exp(-hidden))
        offset: Array = dial["layers.2.weight"] @ hidden + dial["layers.2.bias"]
        return offset

    def _estimate(
        self,
        noisy: Array,
        condition: _Condition,
        t: float,
        text: tuple[Array, Array],
        windows: Windows,
    ) -> Array:
        """Return estimates of the clean latents from those at time t, window by window."""
        config = self.config
        assert config.prediction in PREDICTIONS
        total = np.zeros_like(noisy)
        cuts = [(b, place) for b in range(len(noisy)) for place in windows.places]
        firsts = range(0, len(cuts), _WINDOWS_AT_ONCE)
        for first in _progress(firsts, "painting", f"{_WINDOWS_AT_ONCE} windows"):
            some = cuts[first : first + _WINDOWS_AT_ONCE]
            rows = [b for b, _ in some]
            cut = np.stack(
                [np.concatenate([noisy[b, :, *at], condition.at(b, *at)]) for b, at in some]
            )
            times = np.full(len(some), 1000 * t, np.float32)
            output = self._flow()(x=cut, t=times, sequence=text[0][rows], pooled=text[1][rows])
            if config.prediction == "velocity":
                output = cut[:, : output.shape[1]] - np.float32(t) * output
            for (b, (ys, xs)), part in zip(some, output, strict=True):
                total[b, :, ys, xs] += part * windows.weight
        return total / windows.norm
