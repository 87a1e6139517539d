"""The evaluation of PerCoV2: whole photos at one size, with all measures, in shards.

Every photo is prepared by a protocol, compressed, restored and measured. Its measures and features
are stored at once, one file per photo, so an interrupted run resumes, and shards of a data set may
run on several machines. A report over shards equals that of one run.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from percov2.codec import Codec
from percov2.evaluation import clean_fid
from percov2.evaluation.clip_score import Clip
from percov2.evaluation.feature_sets import PATCH_SIDE, PATCHES, FeatureNetwork, patches
from percov2.evaluation.metrics import METRICS, measure
from percov2.evaluation.realism import describe as describe_lite
from percov2.evaluation.segmentation import ConfusionCounts, Segmenter, read_labels
from percov2.evaluation.setting import Setting, change, digest, facts_of_run
from percov2.evaluation.writers import cell, markdown_table, write_json
from percov2.files import read_arrays, write_bytes
from percov2.images import ENDINGS, read_image, to_rgb
from percov2.stored_files import read_json

__all__ = [
    "KODAK",
    "PROTOCOLS",
    "Judges",
    "Shard",
    "captions_in",
    "evaluate_paper",
    "photo_list",
    "prepared",
    "without_record",
]

PROTOCOLS = ("native", "512", "512-crop")
"""Sizes of the photos: their own; 512×512, squashed; the central square at 512×512."""
_SIDE = 512
_RECORDS, _SETTINGS = "records", "settings.json"
_RESULTS = ("paper.json", "paper.md")
KODAK = tuple(f"kodim{number:02}" for number in range(1, 25))
"""Names of the Kodak photos."""

Pixels = NDArray[np.uint8]


def prepared(pixels: Pixels, protocol: str) -> Pixels:
    """Return a photo, uint8 [H, W, 3], at the size of a protocol.

    "512" squashes it to 512×512 by Pillow's bicubic filter, as the code of PerCo's evaluation does.
    "512-crop" first cuts the largest central square. "native" changes nothing.

    Raises ValueError for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    if protocol == "native":
        return pixels
    if protocol == "512-crop":
        height, width = pixels.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Shard:
    """Every ``of``-th batch of photos, from number ``index`` on; the first shard is 0.

    Raises ValueError if ``index`` is not below ``of``.
    """

    index: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.of:
            raise ValueError(f"shard {self.index} of {self.of} does not exist; they begin at 0")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard of a text such as "0/4". Raise ValueError for other texts."""
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        if found is None:
            raise ValueError(f"{text!r} is no shard like 0/4, the first of four")
        return cls(int(found[1]), int(found[2]))


def photo_list(folder: Path, names: Path | None = None) -> list[Path]:
    """Return the photos of a folder, or those that a file names, one per line, in order of name.

    Raises ValueError if there is none, or if two have one name apart from the ending.
    """
    every = {path.name: path for path in folder.iterdir() if path.suffix.lower() in ENDINGS}
    if names is None:
        chosen = sorted(every)
    else:
        try:
            text = names.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{names} is no text in UTF-8: {error}") from error
        wanted = [line.strip() for line in text.splitlines()]
        chosen = sorted({Path(line).name for line in wanted if line})
        missing = [name for name in chosen if name not in every]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(chosen)} photos of {names} are not in {folder}, such as "
                f"{missing[0]}"
            )
    if len(chosen) < 2:
        where = f"{folder} holds" if names is None else f"{names} names"
        raise ValueError(f"{where} {len(chosen)} photos; an evaluation needs two")
    stems = [Path(name).stem for name in chosen]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"{folder} holds two photos named {twice}")
    return [every[name] for name in chosen]


def captions_in(path: Path) -> dict[str, str]:
    """Return captions by the name of a photo without ending, from a JSON file.

    The file is an object from names to texts, or one of COCO's caption files, of which every
    photo's first caption counts. Raises ValueError for another file.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        texts: dict[str, str] = {}
        if "annotations" in stored:
            names = {one["id"]: Path(one["file_name"]).stem for one in stored["images"]}
            for one in sorted(stored["annotations"], key=lambda one: one["id"]):
                texts.setdefault(names[one["image_id"]], one["caption"])
        else:
            texts = {Path(name).stem: text for name, text in stored.items()}
        wrong = [name for name, text in texts.items() if not isinstance(text, str)]
        if wrong:
            raise ValueError(f"the caption of {wrong[0]} is no text")
        return texts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no captions: {error}") from error


@dataclass(frozen=True)
class Judges:
    """The networks that compare originals and restored photos; None for those without weights.

    Attributes:
        lite: EfficientNet-Lite0, the offline default of realism.
        inception: the network of FID and KID.
        clip: the network of the CLIP score.
        segmenter: the network of mIoU.
    """

    lite: FeatureNetwork | None = None
    inception: FeatureNetwork | None = None
    clip: Clip | None = None
    segmenter: Segmenter | None = None

    @property
    def networks(self) -> dict[str, FeatureNetwork]:
        """Return the networks of distances between sets, by name."""
        both = {"lite": self.lite, "inception": self.inception}
        return {name: network for name, network in both.items() if network is not None}

    def described(self) -> list[str]:
        """Return the definitions of the measures, and what is missing for the others."""
        texts = []
        if self.lite is None:
            texts.append("Fréchet and kernel distance on EfficientNet-Lite0: not measured.")
        else:
            texts.append(describe_lite(self.lite))
        texts.append(
            clean_fid.describe(self.inception)
            if self.inception is not None
            else f"FID and KID: not measured; --inception takes {clean_fid.INCEPTION_FILE}, "
            f"published at {clean_fid.INCEPTION_URL}."
        )
        texts.append(f"Patches of {PATCH_SIDE} pixels: {PATCHES}.")
        texts.append(
            self.clip.describe()
            if self.clip is not None
            else "CLIP score: not measured; --clip takes the name or folder of a CLIP model."
        )
        texts.append(
            self.segmenter.describe()
            if self.segmenter is not None
            else "mIoU: not measured; --segmenter takes the name or folder of a segmentation model."
        )
        return texts


def evaluate_paper(
    codec: Codec,
    photos: Sequence[Path],
    out: Path,
    protocol: str,
    judges: Judges,
    setting: Setting | None = None,
    *,
    captions: Mapping[str, str] | None = None,
    labels: Path | None = None,
    shard: Shard | None = None,
    merge: Sequence[Path] = (),
    batch: int = 1,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Evaluate photos, and write paper.json and paper.md if no photo is missing.

    Args:
        codec: the codec to evaluate; the networks of the measures run where they were opened.
        photos: the photos of the whole data set, as ``photo_list`` returns them.
        out: folder for the records of this run, made if missing. Photos with a record are not
            evaluated again.
        protocol: one of ``PROTOCOLS``.
        judges: the networks of the measures.
        setting: options of the codec; None for the defaults.
        captions: captions by the name of a photo without ending, for the CLIP score; None to leave
            that out.
        labels: folder of label maps, PNG files named as the photos, for mIoU; None to take the
            network's labels of the originals.
        shard: the part of the photos to evaluate; None for all.
        merge: folders of other runs over shards of the same data set, whose records are taken.
        batch: number of photos per call of the codec. On a GPU, a photo's last bits may depend on
            the others, so shards consist of whole batches.
        progress: True to show the progress.

    Returns:
        The contents of paper.json; None if records of other shards are missing.

    Raises:
        ValueError: a folder holds a run of other photos, captions, labels, settings or networks, or
            a photo has no caption or label map.
    """
    setting, shard = setting or Setting(), shard or Shard()
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; choose from {', '.join(PROTOCOLS)}")
    facts = {
        **facts_of_run(codec, setting),
        "protocol": protocol,
        "photos": len(photos),
        "files": _contents(photos),
        "definitions": judges.described(),
        "captions": None if captions is None else _texts(photos, captions),
        "labels": None if labels is None else _contents(_maps(photos, labels)),
        "batch": batch,
        "torch": torch.__version__,
    }
    for folder in (out, *merge):
        _claim(folder, facts, make=folder == out)
    batches = [photos[i : i + batch] for i in range(0, len(photos), batch)]
    for some in tqdm(batches[shard.index :: shard.of], unit="batch", disable=not progress):
        if all(_record_of(path, [out, *merge]) for path in some):
            continue
        records = _evaluated(codec, some, protocol, judges, setting, captions, labels)
        for path, record in zip(some, records, strict=True):
            stream = io.BytesIO()
            np.savez(stream, **record)
            target = out / _RECORDS / f"{path.stem}.npz"
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, stream.getvalue())
    if without_record(photos, [out, *merge]):
        for name in _RESULTS:
            (out / name).unlink(missing_ok=True)
        return None
    complete = [path for photo in photos if (path := _record_of(photo, [out, *merge]))]
    result = {**facts, **_summary(complete, judges)}
    write_json(out / _RESULTS[0], result)
    write_bytes(out / _RESULTS[1], _page(result).encode())
    return result


def without_record(photos: Sequence[Path], folders: Sequence[Path]) -> list[Path]:
    """Return the photos that no run in these folders has evaluated."""
    return [path for path in photos if _record_of(path, folders) is None]


def _contents(paths: Sequence[Path]) -> str:
    """Return a digest of the names and contents of files."""
    return digest(*(f"{path.stem} {digest(path.read_bytes())}".encode() for path in paths))


def _texts(photos: Sequence[Path], captions: Mapping[str, str]) -> str:
    """Return a digest of the photos' captions. Raise ValueError if a photo has none."""
    missing = [path.name for path in photos if path.stem not in captions]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(photos)} photos have no caption, such as {missing[0]}"
        )
    return digest(*(f"{path.stem} {captions[path.stem]}".encode() for path in photos))


def _maps(photos: Sequence[Path], labels: Path) -> list[Path]:
    """Return the photos' label maps. Raise ValueError if a photo has none."""
    maps = [labels / f"{path.stem}.png" for path in photos]
    missing = [path for path in maps if not path.is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(photos)} photos have no label map, such as {missing[0]}"
        )
    return maps


def _evaluated(
    codec: Codec,
    paths: Sequence[Path],
    protocol: str,
    judges: Judges,
    setting: Setting,
    captions: Mapping[str, str] | None,
    labels: Path | None,
) -> Iterator[dict[str, Any]]:
    """Compress and restore photos, and yield the arrays to store of each."""
    originals = [prepared(to_rgb(read_image(path)), protocol) for path in paths]
    images = [Image.fromarray(original) for original in originals]
    files = codec.compress(images, setting.encode, caption=list(setting.captioner(images)))
    pictures = [np.asarray(image) for image in codec.decompress(files, setting.decode)]
    for path, original, file, restored in zip(paths, originals, files, pictures, strict=True):
        values, notes = measure(original, restored)
        yield {
            "bytes": len(file),
            "size": original.shape[:2],
            "notes": np.array(notes, dtype=np.str_),
            **{name: np.nan if value is None else value for name, value in values.items()},
            **_features(judges, original, restored),
            **_likeness(judges, path, original, restored, captions),
            **_segments(judges, path, original, restored, protocol, labels),
        }


def _features(judges: Judges, original: Pixels, restored: Pixels) -> dict[str, Any]:
    found = {}
    for name, network in judges.networks.items():
        for side, pixels in (("original", original), ("restored", restored)):
            seen = network.features([pixels, *patches(pixels)])
            found[f"{name}.{side}"], found[f"{name}.{side}.patches"] = seen[:1], seen[1:]
    return found


def _likeness(
    judges: Judges,
    path: Path,
    original: Pixels,
    restored: Pixels,
    captions: Mapping[str, str] | None,
) -> dict[str, Any]:
    if judges.clip is None:
        return {}
    found: dict[str, Any] = {"clip.likeness": judges.clip.likeness([original], [restored])[0]}
    if captions is not None:
        scores = judges.clip.scores([restored], [captions[path.stem]])
        found |= {"clip.score": scores.values[0], "clip.cut": scores.truncated[0]}
    return found


def _segments(
    judges: Judges,
    path: Path,
    original: Pixels,
    restored: Pixels,
    protocol: str,
    labels: Path | None,
) -> dict[str, Any]:
    if judges.segmenter is None:
        return {}
    expected = None if labels is None else [_labels_at(labels / f"{path.stem}.png", protocol)]
    counts = judges.segmenter.compare([original], [restored], expected).counts.reshape(-1)
    places = np.flatnonzero(counts)
    return {"confusion": np.stack([places, counts[places]])}


def _labels_at(path: Path, protocol: str) -> NDArray[np.int64]:
    """Return labels in a file at the size of a protocol, by the nearest pixel."""
    found = read_labels(path)
    if protocol == "native":
        return found
    height, width = found.shape
    top, left, rows, columns = 0, 0, height, width
    if protocol == "512-crop":
        rows = columns = min(height, width)
        top, left = (height - rows) // 2, (width - columns) // 2
    centres = (np.arange(_SIDE) + 0.5) / _SIDE
    ys, xs = (top + (centres * rows).astype(int)), (left + (centres * columns).astype(int))
    return found[np.ix_(ys, xs)]


def _record_of(path: Path, folders: Sequence[Path]) -> Path | None:
    """Return the stored record of a photo; None if there is none."""
    places = (folder / _RECORDS / f"{path.stem}.npz" for folder in folders)
    return next((place for place in places if place.is_file()), None)


def _claim(folder: Path, facts: Mapping[str, Any], make: bool) -> None:
    """Reserve a folder for a run. Raise ValueError if it holds another run, or none to merge."""
    path, records = folder / _SETTINGS, folder / _RECORDS
    if not path.is_file():
        if not make:
            raise ValueError(f"{folder} holds no run: it has no {_SETTINGS}")
        if records.is_dir() and any(records.iterdir()):
            raise ValueError(f"{records} holds records of unknown settings: {path} is missing")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)
        return
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise ValueError(f"{path} holds no settings of a run")
    unlike = [key for key in facts if stored.get(key) != facts[key]]
    if unlike:
        key = unlike[0]
        raise ValueError(f"{folder} holds another run: {key} {change(stored.get(key), facts[key])}")


def _summary(paths: Sequence[Path], judges: Judges) -> dict[str, Any]:
    """Return means over photos and distances between the sets, in the order of the photos."""
    networks = tuple(f"{name}." for name in judges.networks)
    records = [read_arrays(path, lambda name: not name.startswith(networks)) for path in paths]
    for path, record in zip(paths, records, strict=True):
        if not {"bytes", "size", "notes", *METRICS} <= record.keys():
            raise ValueError(
                f"{path} is no record of a photo; delete it to evaluate the photo again"
            )

    def mean(name: str) -> float | None:
        every = np.array([float(record[name]) for record in records if name in record])
        known = every[~np.isnan(every)]
        return float(known.mean()) if len(known) else None

    sizes = np.array([np.prod(record["size"], dtype=np.int64) for record in records])
    files = np.array([int(record["bytes"]) for record in records])
    values: dict[str, float | None] = {"bytes": float(files.mean())}
    values["bpp"] = float((8 * files / sizes).mean())
    values |= {name: mean(name) for name in METRICS}
    values["clip_score"], values["clip_likeness"] = mean("clip.score"), mean("clip.likeness")
    for network, first, second in (("lite", "frechet", "kernel"), ("inception", "fid", "kid")):
        for suffix, part in (("", ""), (f"_{PATCH_SIDE}", ".patches")):
            names = [f"{network}.{side}{part}" for side in ("original", "restored")]
            values[first + suffix] = values[second + suffix] = None
            if network in judges.networks:
                # One kind of features at a time: of all photos, they are the largest data.
                read = [read_arrays(path, names.__contains__) for path in paths]
                rows, others = (np.concatenate([one[name] for one in read]) for name in names)
                del read
                if len(rows) > 1:
                    values[first + suffix] = clean_fid.fid(rows, others)
                    values[second + suffix] = clean_fid.kid(rows, others)
    values["miou"] = None
    if judges.segmenter is not None:
        total = np.zeros(judges.segmenter.classes**2, np.int64)
        for record in records:
            places, counts = record["confusion"]
            total[places] += counts
        values["miou"] = ConfusionCounts(total.reshape(2 * (judges.segmenter.classes,))).mean_iou
    return {
        "values": values,
        "notes": sorted({str(note) for record in records for note in record["notes"]}),
        "captions_cut": int(sum(bool(record.get("clip.cut", False)) for record in records)),
    }


_FORMS = {
    "bytes": ("bytes", "{:.0f}"),
    "bpp": ("bpp", "{:.4f}"),
    "psnr": ("PSNR, dB", "{:.2f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "lpips_alex": ("LPIPS (AlexNet)", "{:.4f}"),
    "lpips_vgg": ("LPIPS (VGG)", "{:.4f}"),
    "dists": ("DISTS", "{:.4f}"),
    "fid": ("FID", "{:.2f}"),
    "kid": ("KID", "{:.5f}"),
    f"fid_{PATCH_SIDE}": (f"FID/{PATCH_SIDE}", "{:.2f}"),
    f"kid_{PATCH_SIDE}": (f"KID/{PATCH_SIDE}", "{:.5f}"),
    "clip_score": ("CLIP score", "{:.2f}"),
    "clip_likeness": ("CLIP, image to image", "{:.4f}"),
    "miou": ("mIoU", "{:.4f}"),
    "frechet": ("Fréchet (Lite0)", "{:.2f}"),
    "kernel": ("kernel (Lite0)", "{:.4g}"),
    f"frechet_{PATCH_SIDE}": (f"Fréchet (Lite0), {PATCH_SIDE}", "{:.2f}"),
    f"kernel_{PATCH_SIDE}": (f"kernel (Lite0), {PATCH_SIDE}", "{:.4g}"),
}


def _page(result: Mapping[str, Any]) -> str:
    """Return the text of paper.md."""
    values = result["values"]
    rows = [[label, cell(form, values[name])] for name, (label, form) in _FORMS.items()]
    title = f"# {result['model']} {result['rate']}: {result['photos']} photos, {result['protocol']}"
    setting = f"percov2 {result['percov2']}, model id {result['model_id']}, {result['runtime']}, "
    setting += f"schedule {result['schedule']}, {result['steps']} steps, seed {result['seed']}."
    notes = [*result["definitions"], *result["notes"]]
    if result["captions_cut"]:
        notes.append(f"{result['captions_cut']} captions were cut to the length of the model.")
    table = markdown_table(["measure", "value"], rows, 1)
    return "\n".join([title, "", setting, "", table, "", *(f"- {note}" for note in notes)]) + "\n"
