"""``percov2 demo``."""

from __future__ import annotations

import argparse
from typing import Any

from percov2.cli.faults import about, show
from percov2.cli.models import add_model, check_choices, open_codec
from percov2.cli.options import add_command, add_flag, number

__all__ = ["add_parser", "demo"]

_PORT, _LARGEST_PORT = 7860, 65535


def add_parser(commands: Any) -> None:
    """Add ``demo`` to the commands."""
    help_ = "Open a web page that compresses and restores pictures."
    added = add_command(commands, "demo", demo, help_, ("demo", "gradio"))
    help_ = "address to listen at; 0.0.0.0 lets other machines in"
    add_flag(added, "--host", help_, default="127.0.0.1")
    help_ = "port to listen at"
    add_flag(added, "--port", help_, number(int, 1, _LARGEST_PORT), _PORT)
    help_ = "largest accepted picture, in megapixels"
    add_flag(added, "--max-megapixels", help_, number(float, 0.001, 4294), 16.0)
    add_model(added)


def demo(arguments: argparse.Namespace) -> None:
    """Run ``percov2 demo`` until Ctrl-C."""
    check_choices(arguments)
    codec = open_codec(arguments)
    from percov2.demo.answers import Answers
    from percov2.demo.page import MOST_BYTES, THEME, make_page

    answers = Answers(codec, round(1e6 * arguments.max_megapixels))
    page = make_page(answers)
    with about(f"{arguments.host}:{arguments.port}"):
        _, url, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            max_file_size=MOST_BYTES,
            theme=THEME,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
        )
    show(f"percov2: the page is at {url} (Ctrl-C ends it)")
    page.block_thread()
