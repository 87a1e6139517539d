"""The command line: what it prints, writes and returns."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

from percov2 import Codec, cli
from percov2.entropy import SCHEDULES


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG of 70x50 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def file(picture: Path, codec: Codec, tmp_path: Path) -> Path:
    """That picture as a file with a caption."""
    path = tmp_path / "photo.pcv2"
    with Image.open(picture) as image:
        path.write_bytes(codec.compress([image], captions=["a red door"])[0])
    return path


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def failure(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The only line that a failing command prints."""
    capsys.readouterr()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("percov2: ")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


def test_compress_writes_what_the_codec_makes(
    picture: Path, codec: Codec, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.pcv2"
    options = ("--rate", "coarse", "--schedule", "quincunx", "--caption", "a red door")
    assert run("compress", picture, out, "--model", random_model, *options) == 0
    with Image.open(picture) as image:
        (expected,) = codec.compress([image], "coarse", "quincunx", ["a red door"])
    assert out.read_bytes() == expected
    bpp = 8 * len(expected) / (70 * 50)
    text = capsys.readouterr().out
    assert text == f"{out}: {len(expected)} bytes, {bpp:.4f} bpp (70x50, coarse)\n"


def test_decompress_writes_what_the_codec_restores(
    file: Path, codec: Codec, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "restored.png"
    options = ("--steps", 3, "--guidance", 2.5, "--seed", 7, "--device", "cpu")
    assert run("decompress", file, out, "--model", random_model, *options) == 0
    (expected,) = codec.decompress([file.read_bytes()], steps=3, guidance=2.5, seed=7)
    with Image.open(out) as restored:
        np.testing.assert_array_equal(np.asarray(restored), np.asarray(expected))
    assert capsys.readouterr().out == f"{out}: 70x50\n"


def test_info_accounts_for_every_byte(
    file: Path, codec: Codec, capsys: pytest.CaptureFixture
) -> None:
    assert run("info", file, "--json") == 0
    record = json.loads(capsys.readouterr().out)
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
    file: Path,
    codec: Codec,
    random_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    embedded = tmp_path / "pretrained" / "some"
    embedded.mkdir(parents=True)
    (embedded / "config.json").write_bytes((random_model / "config.json").read_bytes())
    monkeypatch.setattr(cli, "EMBEDDED", embedded.parent)
    for model_id, expected in [
        (codec.model_id("fine"), ("random", "fine")),
        (codec.model_id("fine") ^ 1, (None, None)),
    ]:
        (embedded / "model_id").write_text(f"0000 other\n{model_id:04x} fine\n")
        assert run("info", file, "--json") == 0
        record = json.loads(capsys.readouterr().out)
        assert (record["model"], record["rate"]) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_verify_prints_the_hash_of_the_tokens(
    schedule: str,
    picture: Path,
    codec: Codec,
    random_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    path = tmp_path / f"{schedule}.pcv2"
    with Image.open(picture) as image:
        path.write_bytes(codec.compress([image], schedule=schedule)[0])
        tokens = codec.encode_tokens([image])[0]
    expected = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    assert run("info", path, "--verify", "--json", "--model", random_model) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sha256"] == expected
    assert (record["rate"], record["model"]) == ("fine", "random")
    assert run("info", path, "--verify", "--model", random_model) == 0
    text = capsys.readouterr().out
    assert expected in text
    assert "70x50" in text
    assert schedule in text


def test_roundtrip_writes_files_and_records(
    picture: Path, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
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
    assert run(*common) == 0
    assert f"{picture}: {records[0]['bytes']} bytes" in capsys.readouterr().out


def test_eval_writes_a_report(
    picture: Path, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    picture.rename(folder / "a.png")
    out = tmp_path / "report"
    assert run("eval", "kodak", folder, "--out", out, "--model", random_model) == 0
    assert "| mean |" in capsys.readouterr().out
    assert json.loads((out / "report.json").read_text())["images"][0]["image"] == "a.png"
    bad = ("--baselines", "gif")
    command = ("eval", "kodak", folder, "--out", out, "--model", random_model, *bad)
    assert "unknown baselines ['gif']" in failure(capsys, *command)


def test_expected_errors_are_one_line_about_the_file(
    picture: Path,
    file: Path,
    random_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("just words")
    cut = tmp_path / "cut.pcv2"
    cut.write_bytes(file.read_bytes()[:-2])
    other = tmp_path / "other.pcv2"
    other.write_bytes(file.read_bytes()[:2] + b"\0\0" + file.read_bytes()[4:])
    none = tmp_path / "none.png"
    out = tmp_path / "out.png"
    model = ("--model", random_model)
    for command, message in [
        (("compress", none, out, *model), f"{none}: No such file or directory"),
        (("compress", text, out, *model), f"{text}: not a picture"),
        (("compress", tmp_path, out, *model), f"{tmp_path}: Is a directory"),
        (
            ("compress", picture, tmp_path / "x/y.pcv2", *model),
            f"there is no folder {tmp_path / 'x'}",
        ),
        (("compress", picture, out, *model, "--rate", "r9"), "unknown rate 'r9'"),
        (("compress", picture, out, *model, "--max-pixels", 99), "limit of 99"),
        (("compress", picture, out, "--model", "nix"), "model nix: no model 'nix'"),
        (("compress", picture, picture, *model), "photo.png: it is the same file as the input"),
        *(
            (("compress", picture, out, *model, "--device", device), f"unknown device '{device}'")
            for device in ("abacus", "meta", "xpu", "mps", "")
        ),
        (("decompress", none, out, *model), f"{none}: No such file or directory"),
        (("decompress", text, out, *model), f"{text}: not a .pcv2 file"),
        (("decompress", cut, out, *model), f"{cut}: the file is damaged or cut"),
        (("decompress", other, out, *model), f"{other}: the file needs the model with id 0000"),
        (("decompress", file, tmp_path / "out.txt", *model), "no picture format"),
        (("decompress", file, file, *model), "photo.pcv2: it is the same file as the input"),
        (("decompress", file, tmp_path, *model), f"cannot write {tmp_path}: it is a folder"),
        (("decompress", file, out, *model, "--max-pixels", 99), "limit of 99"),
        (("info", text), f"{text}: not a .pcv2 file"),
        (("info", cut, "--verify", *model), f"{cut}: the file is damaged or cut"),
        (("roundtrip", picture, picture, "--out", tmp_path, *model), "'photo' too"),
        (("roundtrip", picture, "--out", tmp_path, *model), "same file as the input"),
        (("roundtrip", file, "--out", text, *model), f"{text}: File exists"),
        (("eval", "kodak", tmp_path, "--out", tmp_path, *model), "same file as the input"),
        (("eval", "kodak", none, "--out", tmp_path, *model), f"{none}: No such file"),
        (("roundtrip", text, "--out", tmp_path / "rt", *model), f"{text}: not a picture"),
    ]:
        assert message in failure(capsys, *command), command
    assert not out.exists()
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_left_out_is_said(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path)
    assert run("compress", path, tmp_path / "o.pcv2", "--model", random_model) == 0
    assert capsys.readouterr().err == (
        "percov2: warning: transparency was flattened on white; it is not stored\n"
    )


def test_warnings_name_the_file_where_several_are_given(
    random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path)
    assert run("roundtrip", *paths, "--out", tmp_path / "out", "--model", random_model) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "flattened" in line]
    assert [line.split(": ")[2] for line in lines] == [str(path) for path in paths]


def test_faults_known_before_loading_load_no_model(
    file: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def load(_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cli, "_open_codec", load)
    for command in [
        ("compress", picture, tmp_path / "none" / "a.pcv2"),
        ("decompress", file, tmp_path / "none" / "a.png"),
        ("decompress", file, tmp_path / "a.pdf"),
        ("roundtrip", picture, "--out", tmp_path),
        ("roundtrip", picture, "--out", picture / "x"),
        ("eval", "kodak", tmp_path, "--out", tmp_path),
        ("eval", "kodak", tmp_path, "--out", tmp_path / "o", "--baselines", "gif"),
    ]:
        failure(capsys, *command)


def test_originals_survive_every_command(
    picture: Path, random_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = picture.read_bytes()
    for command in ("roundtrip", picture), ("eval", "kodak", tmp_path):
        failure(capsys, *command, "--out", tmp_path, "--model", random_model)
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png"}
    assert picture.read_bytes() == before


def test_faults_of_torch_while_working_are_one_line(
    picture: Path, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("percov2.models.preset.CodecModel.encode_tokens", fail)
    command = ("compress", picture, tmp_path / "o.pcv2", "--model", random_model)
    assert f"{picture}: CUDA out of memory. Tried" in failure(capsys, *command)


@pytest.mark.parametrize("part", ["autoencoder", "fine/quantizer", "fine/entropy"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_models_are_one_line(
    part: str, name: str, picture: Path, random_model: Path, tmp_path: Path, capsys
) -> None:
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    path = model / part / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = failure(capsys, "compress", picture, tmp_path / "o.pcv2", "--model", model)
    assert str(model / part) in message


def test_interruption_is_status_130(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_read_file", interrupt)
    assert run("info", file) == 130


WRONG_NUMBERS = [
    *(("--steps", value) for value in ("0", "1001", "1.5", "x")),
    *(("--guidance", value) for value in ("-0.1", "101", "nan", "inf", "x")),
    *(("--seed", value) for value in ("-1", str(2**63), "x")),
]


def test_wrong_usage_is_status_2(capsys: pytest.CaptureFixture) -> None:
    sampling = ["decompress", "a", "b.png"]
    for arguments in [
        *([*sampling, option, value] for option, value in WRONG_NUMBERS),
        *([command, "a", "b", "--max-pixels", "0"] for command in ("compress", "decompress")),
        [],
        ["compress"],
        ["train"],
        ["nonsense"],
        ["info", "a", "--nonsense"],
    ]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_training_phases_match_the_functions_that_they_call() -> None:
    import inspect

    from percov2.training import commands, phases

    assert {"data", "autoencoder", "codec", "tokens", "export"} <= set(phases.PHASES)
    for phase, (_, options) in phases.PHASES.items():
        signature = inspect.signature(getattr(commands, f"run_{phase}"))
        signature.bind(**dict.fromkeys(options))
        required = {
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is inspect.Parameter.empty
        }
        assert {name for name in options if phases.OPTIONS[name].get("required")} >= required


def test_train_passes_its_options_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from percov2.training import commands

    seen: dict[str, object] = {}
    monkeypatch.setattr(commands, "run_autoencoder", lambda **options: seen.update(options))
    arguments = ("--config", "c.toml", "--data", "d", "--out", "o", "--minutes", "3")
    assert run("train", "autoencoder", *arguments) == 0
    expected = {"config": Path("c.toml"), "data": Path("d"), "out": Path("o"), "minutes": 3.0}
    assert seen == expected

    def refuse(**_: object) -> None:
        raise ValueError("no photos\nin d")

    monkeypatch.setattr(commands, "run_autoencoder", refuse)
    assert "train autoencoder: no photos in d" in failure(
        capsys, "train", "autoencoder", *arguments
    )


def subprocess_run(
    code: str, *arguments: object, stdout: int | IO[bytes] = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    return subprocess.run(
        [sys.executable, *code.split(), *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        timeout=120,
    )


def test_info_needs_neither_torch_nor_the_compiled_coder(file: Path) -> None:
    result = subprocess_run("-X importtime -m percov2.cli info", file)
    assert result.returncode == 0, result.stderr
    assert "70x50" in result.stdout
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "percov2.bitstream" in loaded
    for module in ("torch", "percov2._native", "PIL", "diffusers"):
        assert module not in loaded


def test_failures_have_no_traceback(tmp_path: Path) -> None:
    result = subprocess_run("-m percov2.cli info", tmp_path / "none.pcv2")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"percov2: {tmp_path / 'none.pcv2'}: No such file or directory\n"


def test_a_full_or_closed_stdout_is_one_line(file: Path) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess_run("-m percov2.cli info", file, stdout=full)
    assert result.stderr == "percov2: standard output: No space left on device\n"
    assert result.returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        result = subprocess_run("-m percov2.cli info", file, stdout=pipe)
    assert result.stderr == "percov2: standard output: Broken pipe\n"
    assert result.returncode == 2


def test_text_that_the_terminal_lacks_is_escaped(
    picture: Path, codec: Codec, tmp_path: Path
) -> None:
    path = tmp_path / "é.pcv2"
    with Image.open(picture) as image:
        path.write_bytes(codec.compress([image], captions=["grün"])[0])
    for options in ((), ("--json",)):
        result = subprocess_run(
            "-m percov2.cli info", path, *options, PYTHONIOENCODING="ascii", PYTHONUTF8="0"
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert ("gr\\u00fcn" if options else "gr\\xfcn") in result.stdout
