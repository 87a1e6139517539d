"""The command line: output, files and exit status."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import percov2
from percov2 import Codec
from percov2.cli import train
from percov2.cli.main import build_parser
from percov2.entropy import SCHEDULES, rans
from percov2.models import config
from tools.command_line import failure, output, run, subprocess_run


def test_the_commands_write_what_the_codec_makes(picture, random_model, tmp_path, capsys):
    codec = Codec.from_pretrained(random_model)
    file, out = tmp_path / "out.pcv2", tmp_path / "restored.png"
    model = ("--model", random_model)
    options = ("--rate", "coarse", "--schedule", "quincunx", "--caption", "a red door")
    assert run("compress", picture, file, *model, *options) == 0
    said = capsys.readouterr()
    options = {"rate": "coarse", "schedule": "quincunx", "caption": "a red door"}
    expected = codec.compress(picture, **options)
    assert file.read_bytes() == expected
    bpp = 8 * len(expected) / (70 * 50)
    assert said.err == f"{file}: {len(expected)} bytes, {bpp:.4f} bpp (70x50, coarse)\n"
    assert said.out == ""  # which is for data
    options = ("--steps", 3, "--guidance", 2.5, "--seed", 7, "--device", "cpu")
    assert run("decompress", file, out, *model, *options) == 0
    assert capsys.readouterr().err == f"{out}: 70x50\n"
    expected = codec.decompress(file, steps=3, guidance=2.5, seed=7)
    with Image.open(out) as restored:
        np.testing.assert_array_equal(np.asarray(restored), np.asarray(expected))


def test_a_part_of_the_stages_goes_through_every_command(picture, random_model, tmp_path, capsys):
    codec = Codec.from_pretrained(random_model)
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    out, restored, model = tmp_path / "p.pcv2", tmp_path / "p.png", ("--model", random_model)
    (expected,) = codec.compress([image], schedule="qlds5", stages=3, draw_seed=9)
    options = ("--schedule", "qlds5", "--stages", 3, "--draw-seed", 9)
    assert run("compress", picture, out, *model, *options) == 0
    assert out.read_bytes() == expected
    record = json.loads(output(capsys, "info", out, "--json"))
    assert (record["stages_sent"], record["draw_seed"]) == (3, 9)
    assert "qlds5, stages sent: 3, draw seed 9" in output(capsys, "info", out)
    said = f"{restored}: 70x50, 3 of 5 stages from the file, the others drawn\n"
    assert run("decompress", out, restored, *model) == 0
    assert capsys.readouterr().err == said
    with Image.open(restored) as found:
        np.testing.assert_array_equal(
            np.asarray(found), np.asarray(codec.decompress([expected])[0])
        )

    (limited,) = codec.compress([image], target_bytes=len(expected))
    assert run("compress", picture, out, *model, "--target-bytes", len(expected)) == 0
    assert out.read_bytes() == limited and len(limited) <= len(expected)
    assert codec.decode([limited])[0].header.seed == 0

    (whole,) = codec.compress([image], schedule="qlds5")
    out.write_bytes(whole[:-3])
    assert "check does not match" in failure(capsys, "decompress", out, restored, *model)
    assert run("decompress", out, restored, *model, "--allow-truncated") == 0
    printed = capsys.readouterr().err
    (cut,) = codec.decode([whole[:-3]], allow_truncated=True)
    assert 0 < cut.stages < 5
    said = f"{restored}: 70x50, {cut.stages} of 5 stages from the file, the others drawn\n"
    assert printed == said


def test_info_accounts_for_every_byte(file, codec, capsys):
    record = json.loads(output(capsys, "info", file, "--json"))
    parts = record["bytes"]
    assert set(parts) == {"total", "header", "caption", "tokens", "check"}
    assert parts["total"] == len(file.read_bytes())
    assert sum(parts.values()) == pytest.approx(2 * parts["total"])
    assert parts["check"] == 2
    assert 10 <= parts["caption"] < 12
    assert (record["width"], record["height"]) == (70, 50)
    assert record["model_id"] == f"{codec.model_id('fine'):04x}"
    assert record["schedule"] == codec.config.default_schedule
    assert record["caption"] == "a red door"
    assert record["bpp"] == 8 * parts["total"] / 3500
    assert "sha256" not in record


def test_info_names_the_embedded_model_of_a_file(
    file, codec, random_model, tmp_path, capsys, monkeypatch
):
    embedded = tmp_path / "pretrained" / "some"
    embedded.mkdir(parents=True)
    (embedded / "config.json").write_bytes((random_model / "config.json").read_bytes())
    read = config._rates_by_id.__wrapped__
    monkeypatch.setattr(config, "_rates_by_id", lambda _: read(embedded.parent))
    for model_id, expected in [
        (codec.model_id("fine"), ("random", "fine")),
        (codec.model_id("fine") ^ 1, (None, None)),
    ]:
        (embedded / "model_id").write_text(f"0000 other\n{model_id:04x} fine\n")
        record = json.loads(output(capsys, "info", file, "--json"))
        assert (record["model"], record["rate"]) == expected


def test_info_reads_a_modelled_caption_when_it_verifies(picture, random_model, tmp_path, capsys):
    path = tmp_path / "x.pcv2"
    common = ("--model", random_model)
    text = "A woman standing in front of a red door."
    assert run("compress", picture, path, *common, "--caption", text) == 0
    record = json.loads(output(capsys, "info", path, "--json"))
    assert (record["caption_codec"], record["caption"]) == ("model", None)
    said = "coded by the caption model, among the tokens; --verify decodes it"
    assert said in output(capsys, "info", path)
    verified = json.loads(output(capsys, "info", path, "--verify", "--json", *common))
    assert verified["caption"] == text
    parts = verified["bytes"]
    assert 2 < parts["caption"] < 12  # 40 bytes of text
    assert sum(parts.values()) == pytest.approx(2 * parts["total"])
    assert parts["tokens"] + parts["caption"] == pytest.approx(record["bytes"]["tokens"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_verify_prints_the_hash_of_the_tokens(
    schedule, picture, codec, random_model, tmp_path, capsys
):
    path = tmp_path / f"{schedule}.pcv2"
    path.write_bytes(codec.compress(picture, schedule=schedule))
    with Image.open(picture) as image:
        tokens = codec.encode_tokens([image])[0]
    expected = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    command = ("info", path, "--verify", "--model", random_model)
    record = json.loads(output(capsys, *command, "--json"))
    assert (record["sha256"], record["rate"], record["model"]) == (expected, "fine", "random")
    text = output(capsys, *command)
    assert all(word in text for word in (expected, "70x50", schedule))


def test_roundtrip_writes_files_and_records(picture, random_model, tmp_path, capsys):
    second = tmp_path / "grey.png"
    Image.new("L", (20, 20), 90).save(second)
    out = tmp_path / "new" / "out"
    common = ("roundtrip", picture, second, "--out", out, "--model", random_model)
    assert run(*common, "--json") == 0
    captured = capsys.readouterr()
    records = json.loads(captured.out)
    keys = ["image", "bytes", "bpp", "psnr", "ms_ssim", "lpips_alex", "encode_s", "decode_s"]
    assert [list(record) for record in records] == [keys, keys]
    assert records[0]["image"] == str(picture)
    assert records[0]["ms_ssim"] is None
    assert "ms_ssim was not measured" in captured.err
    for record, stem in zip(records, ("photo", "grey"), strict=True):
        assert record["bytes"] == len((out / f"{stem}.pcv2").read_bytes())
    with Image.open(out / "photo.png") as restored, Image.open(out / "photo_compare.png") as page:
        assert restored.size == (70, 50)
        assert page.size == (148, 50)
    assert f"{picture}: {records[0]['bytes']} bytes" in output(capsys, *common)


def test_eval_writes_a_report(picture, random_model, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture.rename(folder / "a.png")
    out = tmp_path / "report"
    command = ("eval", "kodak", folder, "--out", out, "--model", random_model)
    assert "| mean |" in output(capsys, *command)
    assert json.loads((out / "report.json").read_text())["images"][0]["image"] == "a.png"
    assert "unknown baselines ['gif']" in failure(capsys, *command, "--baselines", "gif")


def test_training_phases_match_the_functions_that_they_call():
    assert {"data", "autoencoder", "codec", "tokens", "export"} <= set(train.PHASES)
    for phase, (_, options) in train.PHASES.items():
        module, name = train.home(phase)
        signature = inspect.signature(getattr(importlib.import_module(module), name))
        signature.bind(**dict.fromkeys(options))
        required = {
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is inspect.Parameter.empty
        }
        assert {name for name in options if train.OPTIONS[name].get("required")} >= required


def test_train_passes_its_options_on(monkeypatch, tmp_path, capsys):
    from percov2.training import commands

    config = tmp_path / "c.toml"
    config.touch()
    seen: dict[str, object] = {}
    monkeypatch.setattr(commands, "run_autoencoder", lambda **options: seen.update(options))
    arguments = ("--config", config, "--data", "d", "--out", "o", "--minutes", "3")
    assert run("train", "autoencoder", *arguments) == 0
    expected = {"config": config, "data": Path("d"), "out": Path("o"), "minutes": 3.0}
    assert seen == expected

    def refuse(**_: object) -> None:
        raise ValueError("no photos\nin d")

    monkeypatch.setattr(commands, "run_autoencoder", refuse)
    assert "train autoencoder: no photos in d" in failure(
        capsys, "train", "autoencoder", *arguments
    )


def test_help_of_compress_names_the_choices_of_the_default_model(capsys):
    with pytest.raises(SystemExit) as stop:
        run("compress", "--help")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    folder = Path(percov2.__file__).parent / "pretrained" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    rates = ", ".join(rate["name"] for rate in config["rates"])
    default = f"(default: the model's; tiny's is {config['default_rate']})"
    assert f"rate of the model: for tiny, {rates} {default}" in said
    assert f"entropy schedule: {', '.join(SCHEDULES)} (default: the model's" in said


def options_of(parser):
    """Yield (command, option, help) of a parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)
        elif action.option_strings and action.dest not in ("help", "version"):
            yield parser.prog, action.option_strings[0], action.help


def test_help_of_an_option_states_its_default_or_that_it_is_required():
    options = list(options_of(build_parser()))
    assert len(options) > 100
    stated = re.compile(r"default: |by default |\(required\)$")
    assert not [one for one in options if not stated.search(one[2])]


@pytest.mark.parametrize("command", ["", " compress", " eval kodak", " train codec"])
def test_help_needs_no_torch(command):
    result = subprocess_run(f"-X importtime -m percov2{command} --help")
    assert result.returncode == 0 and f"usage: percov2{command}" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "percov2.cli.main" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "PIL"}


def test_info_needs_neither_torch_nor_the_compiled_coder(file):
    result = subprocess_run("-X importtime -m percov2 info", file)
    assert result.returncode == 0, result.stderr
    assert "70x50" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "percov2.container.bitstream" in loaded
    for module in ("torch", "percov2._native", "PIL", "diffusers"):
        assert module not in loaded


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_module_runs_as_the_command(flag: str) -> None:
    result = subprocess_run("-m percov2", flag)
    assert result.returncode == 0
    assert result.stdout.startswith(f"percov2 {percov2.__version__}\n")


@pytest.mark.parametrize(
    ("built", "devices", "said"),
    [
        (False, {"return_value": ()}, "not built"),
        (True, {"return_value": ()}, "built, no device"),
        (True, {"return_value": ("NVIDIA H100", "NVIDIA A100")}, "built, NVIDIA H100, NVIDIA A100"),
        (True, {"side_effect": RuntimeError("no driver")}, "built, no driver"),
    ],
)
def test_version_says_which_kernels_are_installed(built, devices, said, monkeypatch, capsys):
    monkeypatch.setattr(rans, "cuda_built", lambda: built)
    monkeypatch.setattr(rans, "cuda_devices", Mock(**devices))
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"percov2 {percov2.__version__}"
    assert second == f"compiled kernels: {rans.instruction_set()}; CUDA: {said}"


def test_text_that_the_terminal_lacks_is_escaped(picture, codec, tmp_path):
    path = tmp_path / "é.pcv2"
    with Image.open(picture) as image:
        path.write_bytes(codec.compress([image], caption=["grün"])[0])
    for options in ((), ("--json",)):
        result = subprocess_run(
            "-m percov2 info", path, *options, PYTHONIOENCODING="ascii", PYTHONUTF8="0"
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert ("gr\\u00fcn" if options else "gr\\xfcn") in result.stdout


def test_data_on_standard_output_is_clean(picture, random_model):
    """A summary must not follow the bytes of the file into the pipe."""
    arguments = ("compress", picture, "/dev/stdout", "--model", random_model)
    command = [sys.executable, "-m", "percov2", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == Codec.from_pretrained(random_model).compress(picture)
    assert b"bpp" in done.stderr
