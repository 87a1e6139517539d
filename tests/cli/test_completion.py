"""Completion scripts in real shells, the manual page, and the file type."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from percov2.cli.completion import SHELLS, script
from percov2.cli.main import build_parser
from percov2.cli.man import page
from percov2.entropy import SCHEDULES
from percov2.models.config import EMBEDDED
from tools.command_line import output

pytestmark = pytest.mark.core

SHARE = Path(__file__).parents[2] / "share"
GOLDEN = Path(__file__).parents[1] / "data"
in_a_clone = pytest.mark.skipif(not SHARE.exists(), reason="needs the source tree")


def program(name: str) -> str:
    """The path of a program, without which a test skips."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


COMPLETED = {
    "percov2 comp": "completion compress",
    "percov2 compress --rate ": "r002 r010 r031",
    "percov2 compress --rate=r03": "--rate=r031",
    "percov2 compress a.png --schedule ": " ".join(sorted(SCHEDULES)),
    "percov2 compress --caption ": "",
    "percov2 compress --engine ": "local ray",
    "percov2 compress ": "a.pcv2 b.png sub",
    "percov2 compress --model ": "sub tiny",
    "percov2 decompress ": "a.pcv2 sub",
    "percov2 info --ver": "--verify",
    "percov2 eval figure ": "clip modes pictures rates schedules",
    "percov2 eval kodak --ou": "--out",
    "percov2 completion ": "bash fish zsh",
}
"""What is typed -> what a shell offers."""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "sub").mkdir()
    for name in ("a.pcv2", "b.png"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Terminal:
    """An interactive bash."""

    def __init__(self) -> None:
        self.child, self.end = pty.fork()
        if not self.child:
            os.environ |= {"TERM": "dumb", "INPUTRC": "/dev/null"}
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])

    def run(self, line: str) -> list[str]:
        """Send a line; return what stands in <> on the first line with such that it prints."""
        os.write(self.end, line.encode() + b"\n")
        said, until = "", time.monotonic() + 30
        while time.monotonic() < until:
            if select.select([self.end], [], [], 0.1)[0]:
                said += os.read(self.end, 1 << 16).decode()
            if found := re.search(r"\n((?:<[^<>]*>)+)\r\n", said):
                return re.findall("<(.*?)>", found[1])
        raise TimeoutError(said)

    def close(self) -> None:
        os.close(self.end)
        os.waitpid(self.child, 0)


def test_bash_completes(folder):
    (folder.parent / "script").write_text(script(build_parser(), "bash"))
    terminal = Terminal()
    try:
        # The command prints its arguments, among them those that M-* inserts.
        terminal.run("source ../script; percov2() { printf '<%s>' \"$@\"; echo; }; percov2 ready")
        for typed, offered in COMPLETED.items():
            words = terminal.run(f"{typed}\x1b*")
            *given, begin = typed.removeprefix("percov2 ").split(" ")
            expected = [*given, *(offered.split() or [begin])]
            assert [one for one in words if one] == [one for one in expected if one], typed
    finally:
        terminal.close()


def test_fish_completes(folder):
    fish = program("fish")
    (folder.parent / "script").write_text(script(build_parser(), "fish"))
    for typed, offered in COMPLETED.items():
        code = f"source ../script; complete -C '{typed}'"
        result = subprocess.run([fish, "--no-config", "-c", code], capture_output=True, text=True)
        assert result.stderr == ""
        if typed == "percov2 decompress ":
            offered += " b.png"  # fish lists files of other endings last
        found = sorted(line.partition("\t")[0].rstrip("/") for line in result.stdout.splitlines())
        assert found == sorted(offered.split()), typed


ZSH = """
autoload -U compinit && compinit -u -D
source ../script
bindkey -e
zle -C every complete-word _generic
zstyle ':completion:every:*' insert yes
zstyle ':completion:every::::' completer _all_matches _complete
bindkey '^Xa' every
percov2() { printf '<%s>' "$@"; echo }
"""


def test_zsh_completes(folder):
    zsh = program("zsh")
    (folder.parent / "script").write_text(script(build_parser(), "zsh"))
    (folder.parent / "setup").write_text(ZSH)
    terminal = Terminal()
    try:
        os.write(terminal.end, f"TERM=dumb exec {zsh} -f -i\n".encode())
        terminal.run("source ../setup; percov2 ready")
        for typed, offered in COMPLETED.items():
            words = terminal.run(f"{typed}\x18a")
            *given, begin = typed.removeprefix("percov2 ").split(" ")
            expected = [*given, *(offered.split() or [begin])]
            assert sorted(one for one in words if one) == sorted(filter(None, expected)), typed
    finally:
        terminal.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_a_script_with_every_command_and_flag(shell, capsys):
    text = output(capsys, "completion", shell)
    assert text == script(build_parser(), shell)
    for word in ("import-perco", "max-pixels", "allow-truncated", "target-bytes", "devices"):
        assert word in text


def test_the_manual_page_is_clean_roff_with_every_option(capsys, tmp_path):
    text = output(capsys, "man")
    assert text == page(build_parser())
    for word in (r"\-\-target\-bytes", r"\-\-allow\-truncated", ".SH EXIT STATUS", ".B kodak"):
        assert word in text
    (tmp_path / "percov2.1").write_text(text)
    for command in (["mandoc", "-Tlint"], ["man", "--warnings", "-l"]):
        if shutil.which(command[0]):
            result = subprocess.run(
                [*command, tmp_path / "percov2.1"],
                capture_output=True,
                text=True,
                env=os.environ | {"LC_ALL": "C.UTF-8"},
            )
            assert result.stderr == "" and (command[0] == "man" or result.stdout == "")


@in_a_clone
def test_the_stored_manual_page_is_that_of_the_parser():
    stored = (SHARE / "man/man1/percov2.1").read_text(encoding="utf-8")
    assert stored == page(build_parser()), "percov2 man > share/man/man1/percov2.1"


@in_a_clone
def test_file_recognizes_files_and_names_their_model():
    magic = SHARE / "file/magic/percov2"
    ids = [line.split() for line in (EMBEDDED / "tiny/model_id").read_text().splitlines()]
    for known, rate in ids:
        assert f"0x{known}\t\\b, model tiny, rate {rate}\n" in magic.read_text()

    def said(path: Path, *flags: str) -> str:
        command = [program("file"), "-b", *flags, "-m", magic, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    for _, rate in ids:
        expected = f"percov2 compressed photo, version 1, model tiny, rate {rate}"
        assert said(GOLDEN / f"tiny/{rate}_default.pcv2") == expected
    assert said(GOLDEN / "caption.pcv2").endswith("model 7e57")
    assert said(GOLDEN / "caption.pcv2", "--mime-type") == "image/x-pcv2"
    assert "percov2" not in said(Path(__file__))


@in_a_clone
def test_desktops_know_the_file_type(tmp_path):
    source = SHARE / "mime/packages/percov2.xml"
    kind = "{http://www.freedesktop.org/standards/shared-mime-info}"
    (entry,) = ElementTree.parse(source).getroot()
    assert entry.tag == f"{kind}mime-type" and entry.get("type") == "image/x-pcv2"
    update = program("update-mime-database")
    (tmp_path / "packages").mkdir()
    shutil.copy(source, tmp_path / "packages")
    subprocess.run([update, tmp_path], check=True, capture_output=True)
    assert "50:image/x-pcv2:*.pcv2\n" in (tmp_path / "globs2").read_text()
    assert b"[40:image/x-pcv2]\n>0=\0\2\xfc\x21" in (tmp_path / "magic").read_bytes()


@in_a_clone
def test_installed_scripts_ask_the_command(folder, monkeypatch):
    """The stub of bash, with a command that prints its script."""
    (folder / "bin").mkdir()
    (folder / "script").write_text(script(build_parser(), "bash"))
    (folder / "bin/percov2").write_text(
        '#!/bin/sh\n[ "$*" = "completion bash" ] && exec cat ../script\n'.replace("..", str(folder))
    )
    (folder / "bin/percov2").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    stub = SHARE / "bash-completion/completions/percov2"
    code = f"source {stub}; complete -p percov2"
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "complete -F _percov2 percov2\n" and result.stderr == ""
