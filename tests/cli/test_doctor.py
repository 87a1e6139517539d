"""``percov2 doctor`` names what is there and what is missing, and fails if a test does."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from percov2 import __version__
from percov2.cli import doctor
from percov2.cli.main import main
from percov2.entropy import rans
from tools.command_line import output, subprocess_run

pytestmark = pytest.mark.core

TOKENS = Path(__file__).parents[1] / "data" / "tiny"


def test_everything_works_here(capsys):
    said = output(capsys, "doctor").splitlines()
    assert said[0].startswith(f"percov2   {__version__}, Python {sys.version.split()[0]}, ")
    assert said[1].startswith(f"kernels   {rans.instruction_set()}, ")
    assert [line.split()[0] for line in said].count("ok") == len(doctor.CHECKS)
    assert f"CUDA: {rans.cuda_state()}" in said[1]
    assert "onnxruntime" in said[2] and said[3].startswith("devices   cpu; ")


def test_a_broken_part_leaves_the_other_facts(capsys):
    code = (
        "import sys; sys.modules['percov2._native'] = None; "
        "from percov2.cli.main import main; sys.exit(main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    said = result.stdout.splitlines()
    assert said[1].startswith("kernels   not known: ") and said[2].startswith("networks  onnx")
    assert [line.split()[0] for line in said].count("failed") == len(doctor.CHECKS)


def test_torch_is_not_imported():
    result = subprocess_run("-X importtime -m percov2 doctor")
    assert result.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "onnxruntime" in loaded and not loaded & {"torch", "scipy", "diffusers"}


def test_a_failing_test_is_named_and_changes_the_status(monkeypatch, capsys):
    def broken() -> None:
        raise ValueError("the weights\nare gone")

    monkeypatch.setitem(doctor.CHECKS, "files of the embedded model give the known tokens", broken)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "failed    files of the embedded model give the known tokens: the weights are" in said
    assert said.count("\nok ") == len(doctor.CHECKS) - 1


def test_the_tests_notice_other_tokens_bytes_and_pictures(monkeypatch):
    data, _ = doctor._GOLDEN["r002"]
    monkeypatch.setitem(doctor._GOLDEN, "r002", (data, "0" * 64))
    with pytest.raises(ValueError, match="rate r002 has other tokens"):
        doctor._check_golden()
    monkeypatch.setattr(doctor, "_LEVEL", -200)
    with pytest.raises((ValueError, OverflowError)):
        doctor._check_networks()
    monkeypatch.setattr("percov2.entropy.decode", lambda streams, logits: logits[..., 0] - 1)
    with pytest.raises(ValueError, match="decodes other symbols"):
        doctor._check_rans()


def test_the_golden_files_are_those_of_the_tests():
    record = json.loads((TOKENS / "tokens.json").read_text())
    for rate, (data, tokens) in doctor._GOLDEN.items():
        assert bytes.fromhex(data) == (TOKENS / f"{rate}_default.pcv2").read_bytes()
        assert tokens == record[f"{rate}_default"]["sha256"]


def test_missing_extras_come_with_the_command_that_installs_them(monkeypatch, capsys):
    requirements = [
        "numpy>=1.26",
        'torch>=2.4; extra == "torch"',
        'pillow-heif>=0.18 ; extra == "heif"',
        'percov2[heif,torch] ; extra == "eval"',
        'pytest ; extra == "test"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    extras = {"Provides-Extra": ["torch", "heif", "eval", "test"]}
    monkeypatch.setattr(
        metadata, "metadata", lambda name: type("M", (), {"get_all": lambda _, key: extras[key]})()
    )
    monkeypatch.setattr(doctor, "_version", lambda name: "9" if name == "pillow-heif" else None)
    assert list(doctor._extras()) == [
        ("extras", "heif"),
        ("missing", "pip install 'percov2[torch]'  # torch"),
        ("missing", "pip install 'percov2[eval]'  # torch"),
    ]


def test_devices_ask_torch(capsys):
    said = output(capsys, "doctor", "--devices")
    if find_spec("torch") is None:
        assert "devices   cpu; torch is not installed\n" in said
        return
    import torch

    assert f"torch {torch.__version__}: " in said
    assert torch.cuda.is_available() or "no GPU" in said
