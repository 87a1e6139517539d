"""The model card of a saved pipeline: README.md with the hub's metadata and measured figures.

A card that exists keeps its text. Only the given metadata and the figures between the two markers
change.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from percov2.models.config import ModelConfig
from percov2.stored_files import read_json

__all__ = ["evaluation_results", "write_card"]

_BEGIN, _END = "<!--percov2:figures-->", "<!--/percov2:figures-->"
_KODAK = re.compile(r"kodim\d\d")
_TAGS = {"sd3": ["stable-diffusion-3"]}
_METRICS = {
    "bpp": ("bpp", "bits per pixel"),
    "psnr": ("psnr", "PSNR, dB"),
    "ms_ssim": ("ms_ssim", "MS-SSIM"),
    "lpips_alex": ("lpips", "LPIPS (AlexNet)"),
    "lpips_vgg": ("lpips", "LPIPS (VGG)"),
    "dists": ("dists", "DISTS"),
}
"""The hub's type and the title of the measures of a report."""
_SETTINGS = ("rate", "schedule", "steps", "guidance", "model_id")
"""Settings of a report that the card states with every figure, where the report has them."""


def write_card(
    folder: Path,
    config: ModelConfig,
    reports: Sequence[Path | str] = (),
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Write ``folder/README.md``, or update the card that is there. Return the card.

    Args:
        folder: folder of a saved pipeline.
        config: configuration of its model.
        reports: report.json files of ``percov2 eval kodak`` or ``percov2 eval report``, which
            replace the figures of the card. Without reports, the figures stay.
        metadata: fields of the front matter to set, as for huggingface_hub's ``ModelCardData``. A
            new card has the licence "other" if none is given.

    Raises:
        ValueError: a report is damaged or of another model.
        OSError: a report cannot be read.
    """
    path = folder / "README.md"
    results = [one for report in reports for one in evaluation_results(report, config.name)]
    if path.is_file():
        card = ModelCard(path.read_text(encoding="utf-8"))
    else:
        tags = ["image-compression", "percov2", *_TAGS.get(config.backbone, [])]
        data = ModelCardData(
            library_name="diffusers",
            pipeline_tag="image-to-image",
            tags=tags,
            license="other",
            model_name=config.name,
        )
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder, config)}")
    fields: Any = card.data
    for name, value in (metadata or {}).items():
        setattr(fields, name, value)
    if results:
        fields.model_name = fields.model_name or config.name
        fields.eval_results = results
        figures = f"{_BEGIN}\n{_figures(results)}{_END}"
        card.text = re.sub(
            f"{_BEGIN}.*?{_END}", lambda _: figures, card.text, count=1, flags=re.DOTALL
        )
    card.save(path)
    return card


def evaluation_results(report: Path | str, model: str) -> list[EvalResult]:
    """Return the mean measures of a report.json file as the hub's evaluation results.

    Raises ValueError for a file that is no such report and for a report of another model than
    ``model``; OSError for a file that cannot be read.
    """
    values = read_json(Path(report))
    try:
        found = [values] if "mean" in values else list(values["rates"].values())
        results = [result for one in found for result in _results(one)]
        names = {one["model"] for one in found}
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{report} is no report of percov2 eval kodak or eval report") from error
    if names != {model}:
        raise ValueError(f"{report} is about {', '.join(sorted(names))}, not {model}")
    return results


def _results(report: dict[str, Any]) -> list[EvalResult]:
    """Return the results of one rate. Measures without a value are left out."""
    count = len(report["images"])
    kodak = all(_KODAK.fullmatch(Path(one["image"]).stem) for one in report["images"])
    dataset = f"{'Kodak' if kodak else 'photos'} ({count} pictures)"
    settings = {name: report[name] for name in _SETTINGS if name in report}
    return [
        EvalResult(
            task_type="image-to-image",
            task_name="image compression",
            dataset_type="kodak" if kodak else "photos",
            dataset_name=dataset,
            metric_type=kind,
            metric_name=f"{title} at {report['rate']}",
            metric_value=report["mean"][name],
            metric_args=settings,
        )
        for name, (kind, title) in _METRICS.items()
        if report["mean"].get(name) is not None
    ]


def _figures(results: Sequence[EvalResult]) -> str:
    """Return a Markdown table of results, one row per data set and rate."""
    titles = [title for _, title in _METRICS.values()]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for one in results:
        title, _, rate = str(one.metric_name).rpartition(" at ")
        cells = rows.setdefault((one.dataset_name, rate), {})
        cells[title] = f"{one.metric_value:.4f}"
    lines = [["pictures", "rate", *titles], ["---"] * (2 + len(titles))]
    for key, cells in rows.items():
        lines.append([*key, *(cells.get(title, "–") for title in titles)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(folder: Path, config: ModelConfig) -> str:
    """Return the text of a new card, without front matter."""
    rates = "".join(
        f"| `{rate.name}` | {rate.token_side}×{rate.token_side} | {rate.codebook_size} |\n"
        for rate in config.rates
    )
    weights = ""
    if (folder / "percov2" / "README.md").is_file():
        weights = (
            "[The card of the weights](percov2/README.md) describes training, licence and limits.\n"
        )
    return f"""# {config.name}

This model compresses photos to `.pcv2` files with [PerCoV2](https://arxiv.org/abs/2503.09368). It
needs the package percov2 with the extra `torch`.
{weights}
## Use

```python
from percov2 import PerCoV2Pipeline

pipe = PerCoV2Pipeline.from_pretrained("OWNER/NAME")
data = pipe.compress(image)
image = pipe(data).images[0]
```

`DiffusionPipeline.from_pretrained("OWNER/NAME", custom_pipeline="pipeline",
trust_remote_code=True)` loads the same pipeline.

## Rates

| rate | pixels per token | codes |
|---|---|---|
{rates}
## Figures

{_BEGIN}
None were given.
{_END}

Each row is the mean over the pictures. Sizes are those of whole files.

## Limits

The decoder invents detail: text, faces and small objects may be wrong. Do not use it for evidence
or diagnosis.
"""
