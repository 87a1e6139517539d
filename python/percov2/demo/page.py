"""The page of ``percov2 demo`` in Gradio."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from percov2.demo.answers import RIVALS, Answer, Answers

__all__ = ["MOST_BYTES", "THEME", "make_page"]

MOST_BYTES = 64 << 20
"""Largest accepted upload."""
_KEPT_SECONDS = 3600
"""Time after which pictures and files of requests are deleted."""
_WAITING = 32
"""Most requests that wait; others are refused."""
_FONT = ["system-ui", "sans-serif"]
THEME = gr.themes.Default(font=_FONT, font_mono=["ui-monospace", "monospace"])
"""The theme, which loads no fonts from elsewhere."""
_TITLE = "percov2: photos in a few hundred bytes"


def make_page(answers: Answers) -> gr.Blocks:
    """Return the page, with a queue: requests run one after the other."""
    with gr.Blocks(
        title=_TITLE, analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
    ) as page:
        gr.Markdown(f"# {_TITLE}\nModel `{answers.codec.config.name}`.")
        with gr.Tab("Compress"):
            _compress_tab(answers)
        with gr.Tab("Restore"):
            _restore_tab(answers)
    page.queue(max_size=_WAITING, default_concurrency_limit=1)
    return page


def _compress_tab(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            upload = gr.File(label="Photo", type="filepath", elem_id="photo")
            rate = gr.Dropdown(
                answers.rates, value=answers.codec.config.default_rate, label="Rate", elem_id="rate"
            )
            target = gr.Number(
                0, label="Target bytes (0 for none)", minimum=0, precision=0, elem_id="target"
            )
            realism = _realism(answers)
            button = gr.Button("Compress", variant="primary", elem_id="compress")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(
                label="Original | restored",
                type="pil",
                format="png",
                interactive=False,
                elem_id="slider",
            )
            sentence = gr.Markdown(elem_id="sentence")
            download = gr.DownloadButton(
                "Download the .pcv2 file", interactive=False, elem_id="download"
            )
            compare = gr.Button(
                f"Compare with {', '.join(RIVALS.values())} at the same bytes",
                interactive=False,
                elem_id="compare",
            )
            gallery = gr.Gallery(
                label="At the same bytes", columns=3, format="png", visible=False, elem_id="gallery"
            )
    size = gr.State(0)

    def compress(path: str | None, rate: str, target: int, realism: float) -> tuple[Any, ...]:
        with _shown(path):
            dial = realism if answers.has_dial else None
            answer = answers.compress(_read(path, "a photo"), rate, target or None, dial)
        assert path is not None
        return (
            (answer.original, answer.restored),
            answer.sentence,
            _offered(download, answer, Path(path).stem),
            gr.Button(interactive=True),
            gr.Gallery(visible=False),
            len(answer.file),
        )

    def others(path: str | None, size: int) -> Any:
        with _shown(path):
            return gr.Gallery(answers.rivals(_read(path, "a photo"), size), visible=True)

    outputs = [slider, sentence, download, compare, gallery, size]
    button.click(compress, [upload, rate, target, realism], outputs, api_name="compress")
    compare.click(others, [upload, size], gallery, api_name="compare")


def _restore_tab(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            upload = gr.File(label="A .pcv2 file, also a cut one", type="filepath", elem_id="file")
            realism = _realism(answers)
            button = gr.Button("Restore", variant="primary", elem_id="restore")
        with gr.Column(scale=3):
            picture = gr.Image(
                label="Restored", type="pil", format="png", interactive=False, elem_id="restored"
            )
            sentence = gr.Markdown(elem_id="restored_sentence")

    def restore(path: str | None, realism: float) -> tuple[Image.Image, str]:
        with _shown(path):
            dial = realism if answers.has_dial else None
            answer = answers.restore(_read(path, "a .pcv2 file"), dial)
        return answer.restored, answer.sentence

    button.click(restore, [upload, realism], [picture, sentence], api_name="restore")


def _realism(answers: Answers) -> gr.Slider:
    value = answers.codec.config.realism
    return gr.Slider(
        0, 1, 1.0 if value is None else value, step=0.05, label="Realism", visible=answers.has_dial
    )


def _read(path: str | None, what: str) -> bytes:
    if path is None:
        raise ValueError(f"choose {what} first")
    return Path(path).read_bytes()


def _offered(button: gr.DownloadButton, answer: Answer, stem: str) -> gr.DownloadButton:
    """Return a button that offers the file; the page deletes the file after a while."""
    path = gr.processing_utils.save_bytes_to_cache(answer.file, f"{stem}.pcv2", button.GRADIO_CACHE)
    return gr.DownloadButton(value=path, interactive=True)


@contextmanager
def _shown(path: str | None) -> Iterator[None]:
    """Show expected errors on the page. The messages name the file, not its place here."""
    try:
        yield
    except (ValueError, OSError) as error:
        name = "" if path is None else f"{Path(path).name}: "
        raise gr.Error(
            html.escape(f"{name}{error}"), duration=None, print_exception=False
        ) from None
