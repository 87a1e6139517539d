"""The setting of an evaluation and its description in a report."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from percov2 import __version__
from percov2.codec import Codec
from percov2.container.captions import Captioner, NoCaptioner
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Setting",
    "change",
    "compress",
    "described",
    "digest",
    "facts_of_run",
    "network_digest",
    "network_title",
    "restore",
]


@dataclass(frozen=True)
class Setting:
    """The options and the captioner of an evaluation."""

    encode: EncodeOptions = field(default_factory=EncodeOptions)
    decode: DecodeOptions = field(default_factory=DecodeOptions)
    captioner: Captioner = field(default_factory=NoCaptioner)

    def rate(self, codec: Codec) -> str:
        """Return the name of the rate, or of the codec's default rate if none is set."""
        return self.encode.rate or codec.config.default_rate


def compress(codec: Codec, picture: Image.Image, setting: Setting) -> bytes:
    """Compress a picture (mode RGB) with ``Codec.compress`` and the captioner's caption."""
    (caption,) = setting.captioner([picture])
    return codec.compress(picture, setting.encode, caption=caption)


def restore(codec: Codec, file: bytes, setting: Setting) -> Image.Image:
    """Restore the picture of a file with ``Codec.decompress``."""
    return codec.decompress(file, setting.decode)


def described(codec: Codec, setting: Setting) -> dict[str, Any]:
    """Return the model and the setting, with defaults filled in, as JSON values."""
    config, encode, decode = codec.config, setting.encode, setting.decode
    rate = setting.rate(codec)
    return {
        "model": config.name,
        "runtime": codec.model.runtime,
        "model_id": f"{codec.model_id(rate):04x}",
        "rate": rate,
        "schedule": encode.schedule or config.default_schedule,
        "steps": decode.steps or config.default_steps(rate),
        "guidance": config.guidance if decode.guidance is None else decode.guidance,
        "realism": config.chosen_realism(rate, decode.realism),
        "seed": decode.seed,
        "effort": encode.effort,
        "slack": encode.slack,
        "stages": encode.stages,
        "target_bytes": encode.target_bytes,
        "captioner": type(setting.captioner).__name__,
    }


_TEXTS = ("text", "location")
"""The attributes that determine the captions of a captioner."""


def facts_of_run(codec: Codec, setting: Setting) -> dict[str, Any]:
    """Return what determines the files and restored pictures of a run, as JSON values."""
    known = {**described(codec, setting), "weights": _weights_digest(codec, setting.rate(codec))}
    options, captioner = [asdict(setting.encode), asdict(setting.decode)], setting.captioner
    words = {name.strip("_"): one for name, one in getattr(captioner, "__dict__", {}).items()}
    options.append({f"captioner {name}": str(words[name]) for name in _TEXTS if name in words})
    options.append({k: v for k, v in asdict(codec.model.opened_with).items() if k != "threads"})
    more = {key: value for some in options for key, value in some.items() if key not in known}
    return {
        "percov2": __version__,
        **known,
        "options": more,
        "device": str(codec.model.device),
    }


def change(old: Any, new: Any) -> str:
    """Return what changed from one value to another, of objects and lists only what differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return f"differs in {', '.join(keys)}"
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = zip(old, new, strict=True)
        old, new = next(((one, other) for one, other in pairs if one != other), (old, new))
    return f"was {old!r} and is {new!r}"


def _weights_digest(codec: Codec, rate: str) -> str:
    """Return a digest of the configurations and weights of one rate in a model folder.

    It does not cover the base models of large backbones, which lie outside the folder.
    """
    folder = codec.model.folder
    others = {one.name for one in codec.config.rates} - {rate}
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix in (".json", ".safetensors") and inside.parts[0] not in others:
            _add(sha, inside.as_posix().encode())
            sha.update(path.stat().st_size.to_bytes(8, "little"))
            with open(path, "rb") as stream:
                while block := stream.read(_BLOCK):
                    sha.update(block)
    return sha.hexdigest()[:_DIGITS]


def network_digest(network: nn.Module) -> str:
    """Return a digest of the weights of a network."""
    sha = hashlib.sha256()
    for value in network.state_dict().values():
        _add(sha, value.cpu().numpy().tobytes())
    return sha.hexdigest()[:_DIGITS]


def network_title(location: str, network: nn.Module) -> str:
    """Return the hub's name of a network, or the name of its folder, with a digest of its weights.

    The place of a folder is left out, so that runs on several machines agree.
    """
    name = Path(location).name if Path(location).is_dir() else location
    return f"{name}, weights {network_digest(network)}"


def digest(*parts: bytes) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of the parts and their lengths."""
    sha = hashlib.sha256()
    for part in parts:
        _add(sha, part)
    return sha.hexdigest()[:_DIGITS]


_BLOCK, _DIGITS = 1 << 24, 16


def _add(sha: hashlib._Hash, part: bytes) -> None:
    sha.update(len(part).to_bytes(8, "little"))
    sha.update(part)
