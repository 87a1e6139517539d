"""``percov2 eval kodak|report|stages|modes|captions|realism|paper|entropy|figure|html``."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from percov2.cli.faults import about, say, show
from percov2.cli.models import add_captioner, add_model, check_choices, chosen_captioner, open_codec
from percov2.cli.options import (
    add_command,
    add_flag,
    add_options,
    model_choices,
    number,
    options_of,
)
from percov2.options import DecodeOptions, EncodeOptions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from percov2.evaluation.rivals import Rival
    from percov2.evaluation.setting import Setting
    from percov2.evaluation.study.coders import TokenMap
    from percov2.evaluation.study.comparison import Method
    from percov2.models.backbone import Backbone

__all__ = ["add_parser", "chosen_setting"]

_SWEPT = ("target_bytes", "stages", "draw_seed", "slack", "effort", "max_pixels")
"""Encode options that ``eval stages`` does not take."""
_PHOTOS = "folder made by `percov2 train data`"


def add_parser(commands: Any) -> None:
    """Add ``eval`` to the commands."""
    parser = commands.add_parser("eval", help="Evaluate a model.", description="Evaluate a model.")
    added = parser.add_subparsers(dest="benchmark", required=True, metavar="EVALUATION")

    def command(name: str, run: Any, help_: str, *needs: str) -> argparse.ArgumentParser:
        run = partial(_evaluate, f"eval {name}", run)
        one = add_command(added, name, run, help_, ("eval", "torch", "torchmetrics", *needs))
        add_model(one)
        help_ = "folder for the report and its files (required)"
        one.add_argument("--out", type=Path, required=True, metavar="DIR", help=help_)
        return one

    def photos(one: argparse.ArgumentParser, *left_out: str) -> None:
        one.add_argument("folder", type=Path, metavar="DIR", help="folder of test photos")
        help_ = (
            "comma-separated codecs to compare at equal bytes: jpeg, webp, avif, jpeg2000, jpegxl, "
            "heic, vvc"
        )
        add_flag(one, "--baselines", help_, default="")
        help_ = (
            "another system to compare at its own bytes; may be repeated: a command with {in}, "
            "{bits} and {out}, or a folder with bpp.csv; NAME:Q1,Q2=… gives operating points to "
            "{q} (default: none)"
        )
        form = "NAME=COMMAND|FOLDER"
        one.add_argument("--rival", action="append", default=[], metavar=form, help=help_)
        help_ = "time limit of a rival's command for one picture, in seconds"
        seconds = number(float, 0.1, 10**6)
        add_flag(one, "--rival-seconds", help_, seconds, 600.0, metavar="SECONDS")
        add_options(one, EncodeOptions, "max_pixels", *left_out)
        add_captioner(one)
        add_options(one, DecodeOptions, "max_pixels", "allow_truncated", "allow_sparse")

    one = command("kodak", evaluate_kodak, "Measure bytes and quality on the photos in a folder.")
    help_ = "also write report.html, one file with all tables and pictures (default: do not)"
    one.add_argument("--html", action="store_true", help=help_)
    photos(one)

    help_ = "Run eval kodak at all rates, and write one report with figures about them."
    one = command("report", report_rates, help_, "matplotlib")
    help_ = "comma-separated rates, in the order of the report (default: all rates of the model)"
    add_flag(one, "--rates", help_)
    help_ = (
        "folder of results of other codecs, which reports on several models may share (default: "
        "compared in --out)"
    )
    add_flag(one, "--cache", help_, Path, metavar="DIR")
    help_ = "data set whose published points are added, for example Kodak (default: none)"
    add_flag(one, "--published", help_, metavar="DATASET")
    photos(one, "rate")

    one = command(
        "stages", evaluate_stages, "Measure quality and bytes for each number of stages sent."
    )
    help_ = "folder of test photos"
    one.add_argument("folder", type=Path, metavar="DIR", help=help_)
    add_options(one, EncodeOptions, *_SWEPT)
    add_options(one, DecodeOptions, "max_pixels", "allow_truncated", "allow_sparse")

    def crops(one: argparse.ArgumentParser, count: int, side: int) -> None:
        one.add_argument("photos", type=Path, help=_PHOTOS)
        add_flag(one, "--rate", model_choices()["rate"])
        add_flag(one, "--crops", "number of held-out crops", number(int, 2, 10**6), count)
        add_flag(one, "--side", "side of a crop in pixels", number(int, 2, 4096), side)

    help_ = "Measure distortion and realism for each combination of realism, steps and guidance."
    one = command("modes", evaluate_modes, help_)
    crops(one, 2000, 128)
    add_flag(one, "--steps", "comma-separated numbers of flow evaluations", default="1,2,4,8,20")
    help_ = "comma-separated guidance scales of the caption, each 0 to 100"
    add_flag(one, "--guidance", help_, default="1,2")
    help_ = "comma-separated settings of the dial, 0 to 1, e.g. 0,0.5,1 (default: the rate's)"
    add_flag(one, "--realism", help_)

    help_ = "Compare the right captions with captions of other photos."
    one = command("captions", evaluate_captions, help_)
    crops(one, 500, 192)
    help_ = "number of flow evaluations, 1 to 1000 (default: the rate's)"
    add_flag(one, "--steps", help_, number(int, 1, 1000))
    help_ = "guidance scale of the caption, 0 to 100; 1 disables guidance (default: the model's)"
    add_flag(one, "--guidance", help_, number(float, 0, 100))
    help_ = "number of restored crops to show, 0 to 100"
    add_flag(one, "--pictures", help_, number(int, 0, 100), 8)

    one = command("realism", evaluate_realism, "Measure quality and realism on held-out crops.")
    one.add_argument("photos", type=Path, help=_PHOTOS)
    add_flag(one, "--side", "side of a crop in pixels", number(int, 1, 4096), 256)
    help_ = "distance between crops in pixels, at most --side"
    add_flag(one, "--stride", help_, number(int, 1, 4096), 128)
    help_ = "measure LPIPS and DISTS on N crops per photo (default: all)"
    add_flag(one, "--distances", help_, number(int, 1, 10**6), metavar="N")
    add_flag(one, "--limit", "use N photos (default: all)", number(int, 2, 10**6), metavar="N")
    help_ = "folder of the originals' features; runs may share it (default: in --out)"
    add_flag(one, "--cache", help_, Path, metavar="DIR")
    help_ = "compare with a finished run on the same crops; DIR is its --out (default: none)"
    add_flag(one, "--against", help_, Path, metavar="DIR")
    add_options(one, EncodeOptions, "max_pixels")
    add_options(one, DecodeOptions, "max_pixels", "allow_truncated", "allow_sparse")

    help_ = "Evaluate a data set as the paper does, in shards that can be merged."
    one = command("paper", evaluate_paper, help_)
    help_ = "folder of photos, after the word kodak or coco for these data sets"
    one.add_argument("photos", nargs="+", metavar="[kodak|coco] DIR", help=help_)
    help_ = (
        "native, 512 (squashed to 512×512) or 512-crop (the central square at 512×512) (default: "
        "512 for coco, else native)"
    )
    one.add_argument("--protocol", choices=["native", "512", "512-crop"], help=help_)
    help_ = "text file with the names of the photos to take, one per line (default: all)"
    add_flag(one, "--names", help_, Path, metavar="FILE")
    help_ = "evaluate shard I of N, from 0 on, e.g. 0/4 (default: all photos)"
    add_flag(one, "--shard", help_, metavar="I/N")
    help_ = "folders of other shards' runs, to report on all together (default: none)"
    one.add_argument("--merge", type=Path, nargs="+", default=[], metavar="DIR", help=help_)
    help_ = "Inception's TorchScript file for FID and KID (default: they are not measured)"
    add_flag(one, "--inception", help_, Path, metavar="FILE")
    help_ = "name or folder of a CLIP model (default: the CLIP score is not measured)"
    add_flag(one, "--clip", help_, metavar="MODEL")
    help_ = (
        "JSON file of captions by photo, or COCO's caption file, for the CLIP score (default: none)"
    )
    add_flag(one, "--captions", help_, Path, metavar="FILE")
    help_ = "name or folder of a segmentation model (default: mIoU is not measured)"
    add_flag(one, "--segmenter", help_, metavar="MODEL")
    help_ = "folder of label maps, PNG files (default: labels of the originals by --segmenter)"
    add_flag(one, "--labels", help_, Path, metavar="DIR")
    help_ = "photos per call of the codec (default: 1 on the CPU, else 16)"
    add_flag(one, "--batch-size", help_, number(int, 1, 1024), metavar="N")
    add_options(one, EncodeOptions, "max_pixels")
    add_captioner(one)
    add_options(one, DecodeOptions, "max_pixels", "allow_truncated", "allow_sparse")

    one = command("entropy", evaluate_entropy, "Compare entropy schedules on held-out tokens.")
    help_ = ".npz file of token maps made by `percov2 train tokens` (required)"
    add_flag(one, "--data", help_, Path, required=True)
    add_flag(one, "--rate", "rate of the token maps, e.g. r031 (default: the model's)")
    help_ = (
        "folder made by the `percov2 train entropy` that trained the model; --finetune and "
        "--baselines need it (default: none)"
    )
    add_flag(one, "--entropy-run", help_, Path)
    help_ = "number of fine-tuning steps for each schedule before it is measured again"
    add_flag(one, "--finetune", help_, number(int, 0, 10**6), 0, metavar="STEPS")
    help_ = (
        "comma-separated baselines to train as long as the shared weights: masked (the paper's "
        "masked model), multiscale (explicit VAR)"
    )
    add_flag(one, "--baselines", help_, default="")
    help_ = f"{_PHOTOS}, source of the token maps; multiscale needs it (default: none)"
    add_flag(one, "--photos", help_, Path)

    help_ = "Write one HTML page about other evaluations, with their tables, curves and pictures."
    run = partial(_evaluate, "eval html", write_page)
    one = add_command(added, "html", run, help_, ("eval", "matplotlib"))
    help_ = "report.json or realism.json of an evaluation"
    one.add_argument("files", nargs="+", type=Path, metavar="JSON", help=help_)
    help_ = "the page, .html (required)"
    one.add_argument("--out", type=Path, required=True, metavar="FILE", help=help_)
    help_ = "data set whose published points are added, for example Kodak (default: none)"
    add_flag(one, "--published", help_, metavar="DATASET")

    help_ = "Draw a figure from JSON files of other evaluations."
    drawn = added.add_parser("figure", help=help_, description=help_)
    kinds = drawn.add_subparsers(dest="kind", required=True, metavar="KIND")

    def figure(name: str, help_: str, given: str | None = "report.json") -> argparse.ArgumentParser:
        run = partial(_evaluate, f"eval figure {name}", draw_figure)
        one = add_command(kinds, name, run, help_, ("eval", "matplotlib"))
        if given is not None:
            help_ = f"{given} of an evaluation"
            one.add_argument("files", nargs="+", type=Path, metavar="JSON", help=help_)
        help_ = "the figure, .png or .svg (required)"
        one.add_argument("--out", type=Path, required=True, metavar="FILE", help=help_)
        return one

    figure("modes", "Distortion over realism for each mode.", "modes.json")
    both = "report.json or realism.json"
    one = figure("rates", "Each metric over bits per pixel.", both)
    add_flag(one, "--metrics", "comma-separated metrics (default: all that were measured)")
    help_ = "data set whose published points are added, for example Kodak (default: none)"
    add_flag(one, "--published", help_, metavar="DATASET")
    figure("clip", "CLIP scores over bits per pixel.", both)
    one = figure("pictures", "Rows of pictures: the original and each system.")
    add_flag(one, "--images", "comma-separated names of pictures (default: the first four)")
    add_flag(one, "--systems", "comma-separated systems, for example percov2,vvc (default: all)")
    one = figure("schedules", "Stage maps of the entropy schedules.", None)
    add_flag(one, "--schedules", "comma-separated schedules (default: all)")


def _evaluate(
    name: str, run: Callable[[argparse.Namespace], str], arguments: argparse.Namespace
) -> None:
    """Run an evaluation and print the text that it returns."""
    with about(name):
        text = run(arguments)
    for line in text.splitlines():
        show(line)


def _check(arguments: argparse.Namespace, folder: Path) -> None:
    """Raise an error for wrong options or folders, before torch is loaded."""
    encode, decode = options_of(EncodeOptions, arguments), options_of(DecodeOptions, arguments)
    folder.stat()
    check_choices(arguments, encode, decode)


def chosen_setting(arguments: argparse.Namespace) -> Setting:
    """Return the setting of a command line; captioner flags are optional."""
    from percov2.container.captions import NoCaptioner
    from percov2.evaluation.setting import Setting

    captioner = chosen_captioner(arguments) if hasattr(arguments, "captioner") else NoCaptioner()
    options = options_of(EncodeOptions, arguments), options_of(DecodeOptions, arguments)
    return Setting(*options, captioner)


def _held_out(
    arguments: argparse.Namespace, captioned: bool
) -> tuple[NDArray[np.uint8], list[str]]:
    """Return fixed crops of held-out photos, uint8 [N, S, S, 3], and their captions."""
    import numpy as np

    from percov2.photos import PhotoCrops

    photos = PhotoCrops(arguments.photos, "held out")
    if captioned:
        photos = photos.with_captions()
    images, captions = photos.batch(np.random.default_rng(0), arguments.crops, arguments.side)
    levels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return levels.contiguous().numpy(), captions


def _numbers(text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{text!r} is not a list of numbers like 1,2,4") from error


def evaluate_kodak(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval kodak``."""
    _check(arguments, arguments.folder)
    from percov2.evaluation import report
    from percov2.evaluation.report_page import table

    folder, out = arguments.folder, arguments.out
    baselines, rivals = _others(arguments)
    report.plan_evaluation(folder, out, baselines, rivals)
    codec, setting = open_codec(arguments), chosen_setting(arguments)
    result = report.evaluate(codec, folder, out, setting, baselines, rivals=rivals)
    mean = table([{"image": "mean", **result["mean"]}], "kodak")
    written = [out / "report.md"]
    if arguments.html:
        from percov2.evaluation.html_report import write_html

        written.append(out / "report.html")
        write_html([out / "report.json"], written[-1])
    return "\n".join([mean, *report.missing(baselines), *map(str, written)])


def _others(arguments: argparse.Namespace) -> tuple[list[str], list[Rival]]:
    """Return the baselines and the rivals of a command line."""
    from percov2.evaluation.rivals import parse_rivals

    limit = arguments.rival_seconds
    rivals = [rival for text in arguments.rival for rival in parse_rivals(text, limit)]
    return _names(arguments.baselines), rivals


def _names(text: str | None) -> list[str]:
    return [part for part in (text or "").split(",") if part]


def report_rates(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval report``."""
    _check(arguments, arguments.folder)
    from percov2.evaluation import rates, report
    from percov2.models.config import find_model

    folder, out = arguments.folder, arguments.out
    baselines, rivals = _others(arguments)
    _, config = find_model(arguments.model)
    names = _names(arguments.rates) or [rate.name for rate in config.rates]
    for name in names:
        check_choices(arguments, EncodeOptions(rate=name), options_of(DecodeOptions, arguments))
    rates.plan_rates(folder, out, names, baselines, rivals, arguments.published)
    rates.evaluate_rates(
        open_codec(arguments),
        folder,
        out,
        chosen_setting(arguments),
        names,
        baselines,
        rivals,
        kept=arguments.cache,
        dataset=arguments.published,
        command=_command_of(arguments),
        say=say,
    )
    return "\n".join([*report.missing(baselines), str(out / "report.md")])


_PLACES = {"folder": "FOLDER", "out": "OUT", "cache": "CACHE"}
"""Words for the folders of a command line in a report."""


def _command_of(arguments: argparse.Namespace) -> str:
    """Return the command of ``eval report``, with words for folders, without the defaults."""
    words = ["percov2", "eval", "report"]
    for action in sorted(arguments.parser._actions, key=lambda one: bool(one.option_strings)):
        value = getattr(arguments, action.dest, None)
        if value is None or value == action.default:
            continue
        flags = action.option_strings[-1:]
        if isinstance(value, Path):
            value = _PLACES.get(action.dest, value.name)
        elif action.dest == "model":
            value = Path(value).name
        for one in value if isinstance(value, list) else [value]:
            words += flags if value is True else [*flags, shlex.quote(str(one))]
    return " ".join(words)


def write_page(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval html``."""
    from percov2.evaluation.html_report import write_html

    write_html(arguments.files, arguments.out, arguments.published)
    return str(arguments.out)


def draw_figure(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval figure``."""
    from percov2.evaluation import figures

    def named(option: str) -> list[str]:
        return _names(getattr(arguments, option))

    out = arguments.out
    if arguments.kind == "schedules":
        figures.schedules_figure(out, named("schedules"))
    elif arguments.kind == "modes":
        figures.modes_figure(arguments.files, out)
    elif arguments.kind == "rates":
        figures.rates_figure(arguments.files, out, named("metrics"), arguments.published)
    elif arguments.kind == "clip":
        figures.clip_figure(arguments.files, out)
    else:
        figures.pictures_figure(arguments.files, out, named("images"), named("systems"))
    return str(out)


def evaluate_stages(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval stages``."""
    _check(arguments, arguments.folder)
    codec = open_codec(arguments)
    from percov2.evaluation.hybrid import plot_stages, stages_sent
    from percov2.evaluation.report import pictures_in

    paths = pictures_in(arguments.folder)
    records = stages_sent(codec, paths, arguments.out, chosen_setting(arguments))
    plot_stages(records, arguments.out / "stages.png")
    return "\n".join(
        f"{record['stages']:3} of {record['of']} stages: {record['bytes']:.1f} bytes, PSNR "
        f"{record['psnr']:.2f} dB, LPIPS {record['lpips_alex']:.3f}"
        for record in records
    )


def evaluate_modes(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval modes``."""
    steps, guidances = _numbers(arguments.steps, int), _numbers(arguments.guidance, float)
    realisms = _numbers(arguments.realism, float) if arguments.realism else [None]
    arguments.photos.stat()
    for realism in realisms:
        decode = DecodeOptions(realism=realism)
        check_choices(arguments, EncodeOptions(rate=arguments.rate), decode)
    crops, captions = _held_out(arguments, captioned=False)
    codec = open_codec(arguments)
    from percov2.evaluation.figures import draw_modes
    from percov2.evaluation.modes import operating_modes

    modes = arguments.rate, steps, guidances, realisms
    records = operating_modes(codec, crops, captions, arguments.out, *modes)
    draw_modes(records, arguments.out / "modes.png")
    return "\n".join(
        f"realism {record['realism']:g}, {record['steps']} steps, guidance "
        f"{record['guidance']:g}: PSNR "
        f"{record['psnr']:.2f} dB, LPIPS {record['lpips_alex']:.3f}, Fréchet distance "
        f"{record['frechet']:.3f} (EfficientNet-Lite0, {record['crops']} crops)"
        for record in records
    )


def evaluate_captions(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval captions``."""
    check_choices(arguments, EncodeOptions(rate=arguments.rate))
    arguments.photos.stat()
    crops, captions = _held_out(arguments, captioned=True)
    codec = open_codec(arguments, "torch")
    from percov2.evaluation import caption_effect as effect
    from percov2.evaluation.gallery import write_page
    from percov2.files import write_bytes

    rate = arguments.rate or codec.config.default_rate
    sampling = rate, arguments.steps, arguments.guidance
    text = json.dumps(effect.caption_effect(codec, crops, captions, *sampling), indent=2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_bytes(arguments.out / f"captions_{rate}.json", (text + "\n").encode())
    if arguments.pictures:
        few, others = slice(arguments.pictures), effect.other_captions(captions)
        shown = crops[few], captions[few], others[few]
        rows = effect.caption_pictures(codec, *shown, *sampling)
        write_page(rows, arguments.out / f"captions_{rate}.jpg")
    return text


def evaluate_realism(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval realism``."""
    _check(arguments, arguments.photos)
    from percov2.evaluation.judge import Crops, judge_realism
    from percov2.photos import PhotoCrops

    crops = Crops(arguments.side, arguments.stride, arguments.distances, arguments.limit)
    photos = PhotoCrops(arguments.photos, "held out")
    codec = open_codec(arguments)
    setting, folders = chosen_setting(arguments), (arguments.cache, arguments.against)
    judge_realism(codec, photos, arguments.out, setting, crops, *folders)
    return (arguments.out / "realism.md").read_text(encoding="utf-8").removesuffix("\n")


def evaluate_paper(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval paper``."""
    *kind, folder = arguments.photos
    if len(kind) > 1 or (kind and kind[0] not in ("kodak", "coco")):
        raise ValueError(f"{' '.join(arguments.photos)!r} is not a folder, kodak DIR or coco DIR")
    name = kind[0] if kind else ""
    _check(arguments, Path(folder))
    if arguments.captions and not arguments.clip:
        raise ValueError("--captions is for the CLIP score; name a model with --clip")
    if arguments.labels and not arguments.segmenter:
        raise ValueError("--labels is for mIoU; name a model with --segmenter")
    if name == "coco" and arguments.names is None:
        raise ValueError("coco needs --names, the list of its 30,000 photos")
    from percov2.evaluation import paper

    shard = paper.Shard.parse(arguments.shard) if arguments.shard else None
    photos = paper.photo_list(Path(folder), arguments.names)
    if name == "kodak" and tuple(path.stem for path in photos) != paper.KODAK:
        raise ValueError(f"{folder} does not hold the 24 photos kodim01 to kodim24 alone")
    captions = paper.captions_in(arguments.captions) if arguments.captions else None
    judges = _judges(arguments)
    codec = open_codec(arguments)
    on_cpu = str(codec.model.device) == "cpu"
    result = paper.evaluate_paper(
        codec,
        photos,
        arguments.out,
        arguments.protocol or ("512" if name == "coco" else "native"),
        judges,
        chosen_setting(arguments),
        captions=captions,
        labels=arguments.labels,
        shard=shard,
        merge=arguments.merge,
        batch=arguments.batch_size or (1 if on_cpu else 16),
    )
    if result is None:
        count = len(paper.without_record(photos, [arguments.out, *arguments.merge]))
        return (
            f"the records are in {arguments.out}; {count} of {len(photos)} photos have none yet. "
            "After the other shards, --merge with their folders reports on all"
        )
    return (arguments.out / "paper.md").read_text(encoding="utf-8").removesuffix("\n")


def _judges(arguments: argparse.Namespace) -> Any:
    """Return the networks of ``eval paper`` that the command line names or the package has."""
    from percov2.evaluation.clean_fid import InceptionFeatures
    from percov2.evaluation.clip_score import Clip
    from percov2.evaluation.paper import Judges
    from percov2.evaluation.realism import LiteNetwork
    from percov2.evaluation.segmentation import Segmenter
    from percov2.models.torch.perceptual import MetricWeightsMissing

    device = arguments.device
    size = 1 if device == "cpu" else 16
    try:
        lite = LiteNetwork(device, batch_size=size)
    except MetricWeightsMissing:
        lite = None
    inception = arguments.inception and InceptionFeatures(arguments.inception, device, size)
    clip = arguments.clip and Clip(arguments.clip, device)
    segmenter = arguments.segmenter and Segmenter(arguments.segmenter, device)
    return Judges(lite, inception or None, clip or None, segmenter or None)


def evaluate_entropy(arguments: argparse.Namespace) -> str:
    """Run ``percov2 eval entropy``."""
    check_choices(arguments, EncodeOptions(rate=arguments.rate))
    baselines = [part for part in arguments.baselines.split(",") if part]
    unknown = sorted(set(baselines) - {"masked", "multiscale"})
    if unknown:
        raise ValueError(f"unknown baselines {unknown}; choose from masked and multiscale")
    if (arguments.finetune or baselines) and arguments.entropy_run is None:
        raise ValueError("training needs --entropy-run, the run that trained the model")
    if "multiscale" in baselines and arguments.photos is None:
        raise ValueError("multiscale needs --photos, the photos of the token maps")
    arguments.data.stat()
    from percov2.evaluation.study.coders import token_map
    from percov2.evaluation.study.comparison import compare
    from percov2.training.stage2 import TokenMaps

    data = TokenMaps(arguments.data)
    codec = open_codec(arguments, "torch")
    rate = codec.config.rate(arguments.rate or codec.config.default_rate)
    if data.codebook_size != rate.codebook_size:
        raise ValueError(
            f"{arguments.data} has a codebook of {data.codebook_size} entries, but rate "
            f"{rate.name} has {rate.codebook_size}; choose the --rate of the token maps"
        )
    sizes = {"codebook_size": rate.codebook_size, "token_side": rate.token_side}
    facts = {"rate": rate.name, **sizes, "command": _entropy_command(arguments, rate.name)}
    maps = [token_map(grid) for grid in data.held_out]
    methods = _entropy_methods(arguments, baselines, codec.model, rate.name, maps)
    compare(maps, methods, facts, arguments.out)
    return str(arguments.out / "report.md")


def _entropy_command(arguments: argparse.Namespace, rate: str) -> str:
    """Return the command for a report, with the names of files but not their folders."""
    words = ["percov2 eval entropy --model", Path(arguments.model).name, "--rate", rate]
    words += ["--data", arguments.data.name, "--out", arguments.out.name]
    for name in ("entropy_run", "baselines", "photos", "finetune"):
        if value := getattr(arguments, name):
            words += [f"--{name.replace('_', '-')}", getattr(value, "name", str(value))]
    return " ".join(words)


def _entropy_methods(
    arguments: argparse.Namespace,
    baselines: list[str],
    model: Backbone,
    rate: str,
    maps: list[TokenMap],
) -> Iterator[Method]:
    """Yield the compared methods; each is trained only when it is its turn."""
    from percov2.entropy.opening import open_coder
    from percov2.evaluation.study.coders import OrderCoder
    from percov2.evaluation.study.comparison import order_methods
    from percov2.training.study import methods
    from percov2.training.study.runs import shared_run

    coder = open_coder(model.folder / rate / "entropy", arguments.device)
    runs, data, run = arguments.out / "runs", arguments.data, None
    if arguments.entropy_run is not None:
        run = shared_run(arguments.entropy_run, coder.model.fingerprint())
    yield from order_methods("shared", lambda _, order: OrderCoder(coder, order), maps, draw=True)
    if run is None:
        return
    if arguments.finetune:
        yield from methods.fine_tuned_methods(run, data, maps, arguments.finetune, runs)
    if "masked" in baselines:
        yield from methods.masked_methods(run, data, maps, runs / "masked")
    if "multiscale" in baselines:
        photos, out = arguments.photos, runs / "multiscale"
        yield from methods.multiscale_methods(run, model, rate, photos, maps, out)
