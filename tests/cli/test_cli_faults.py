"""Faults on the command line: one line, an exit status, no half-written file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import pytest
from PIL import Image

from percov2.cli import compress, decompress, evaluate, info, roundtrip
from percov2.cli.main import main
from tools.command_line import failure, output, run, subprocess_run


def test_expected_errors_are_one_line_about_the_file(picture, file, random_model, tmp_path, capsys):
    text = tmp_path / "notes.txt"
    text.write_text("just words")
    cut = tmp_path / "cut.pcv2"
    cut.write_bytes(file.read_bytes()[:-2])
    other = tmp_path / "other.pcv2"
    other.write_bytes(file.read_bytes()[:2] + b"\0\0" + file.read_bytes()[4:])
    none, out, before = tmp_path / "none.png", tmp_path / "out.png", picture.read_bytes()
    small = tmp_path / "out.pcv2"
    model = ("--model", random_model)
    theirs, ours = tmp_path / "theirs.pcv2", tmp_path / "ours.png"
    theirs.write_text("somebody's")
    unrelated = tmp_path / "sub" / "theirs.png"
    unrelated.parent.mkdir()
    unrelated.write_bytes(before)
    ours.write_bytes(file.read_bytes())
    for command, message in [
        (("compress", text, small, *model), f"{text}: not a picture"),
        (("compress", tmp_path, small, *model), f"-o {small} is no folder, but there are several"),
        (
            ("compress", picture, tmp_path / "x/y.pcv2", *model),
            f"there is no folder {tmp_path / 'x'}",
        ),
        (("compress", picture, small, *model, "--max-pixels", 99), "limit of 99"),
        (("compress", picture, small, "--model", "nix"), "model nix: no model 'nix'"),
        (
            ("compress", picture, "-o", out, *model),
            f"{out}: the name of a compressed file must end in",
        ),
        (
            ("compress", picture, "-o", text, *model),
            f"{text}: the name of a compressed file must end",
        ),
        (("compress", picture, theirs, *model), f"{theirs}: it exists and is no .pcv2 file"),
        (("decompress", file, ours, *model), f"{ours}: it exists and is no picture"),
        (
            ("compress", picture, "-o", picture, *model),
            "photo.png: it is the same file as the input",
        ),
        *(
            (("compress", picture, small, *model, "--device", device), f"unknown device '{device}'")
            for device in ("meta", "xpu", "mps", "")
        ),
        (("decompress", none, out, *model), f"{none}: No such file or directory"),
        (("decompress", text, out, *model), f"{text}: not a .pcv2 file"),
        (("decompress", cut, out, *model), f"{cut}: the file is damaged or cut"),
        (("decompress", other, out, *model), f"{other}: the file needs the model with id 0000"),
        (("decompress", file, tmp_path / "out.txt", *model), "no picture format"),
        (
            ("decompress", file, "-o", file, *model),
            "photo.pcv2: it is the same file as the input",
        ),
        (("decompress", file, out, *model, "--max-pixels", 99), "limit of 99"),
        (("info", text), f"{text}: not a .pcv2 file"),
        (("info", file, "--max-pixels", 99), "limit of 99"),
        (("info", cut, "--verify", *model), f"{cut}: the file is damaged or cut"),
        (("roundtrip", picture, picture, "--out", tmp_path, *model), "'photo' too"),
        (("roundtrip", picture, "--out", tmp_path, *model), "same file as the input"),
        (("roundtrip", file, "--out", text, *model), f"{text}: File exists"),
        (("roundtrip", unrelated, "--out", tmp_path, *model), f"{theirs}: it exists and is no"),
        (("eval", "kodak", tmp_path, "--out", tmp_path, *model), "same file as the input"),
        (("roundtrip", text, "--out", tmp_path / "rt", *model), f"{text}: not a picture"),
    ]:
        assert message in failure(capsys, *command), command
    assert not out.exists() and not small.exists() and theirs.read_text() == "somebody's"
    assert not list(tmp_path.rglob("*.part")) and picture.read_bytes() == before


def test_endless_inputs_are_read_only_in_part(file, picture, tmp_path, monkeypatch, capsys):
    store = pytest.importorskip("fsspec").filesystem("memory")
    store.pipe_file("/endless.png", picture.read_bytes())
    monkeypatch.setattr(info, "MAX_FILE_BYTES", file.stat().st_size - 1)
    monkeypatch.setattr(compress, "_MOST_BYTES", picture.stat().st_size - 1)
    for command in (("info", file), ("decompress", file, tmp_path / "o.png")):
        assert f"is longer than {file.stat().st_size - 1} bytes" in failure(capsys, *command)
    said = failure(capsys, "compress", "memory://endless.png", tmp_path / "o.pcv2")
    assert f"is longer than {picture.stat().st_size - 1} bytes" in said


def test_what_is_left_out_is_said_of_the_file_where_several_are_given(
    random_model, tmp_path, capsys
):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path)
    assert run("compress", paths[0], tmp_path / "o.pcv2", "--model", random_model) == 0
    first, _ = capsys.readouterr().err.splitlines()
    assert first == "percov2: warning: transparency was flattened on white; it is not stored"
    assert run("roundtrip", *paths, "--out", tmp_path / "out", "--model", random_model) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "flattened" in line]
    assert [line.split(": ")[2] for line in lines] == [str(path) for path in paths]


def test_faults_known_before_loading_load_no_model(file, picture, tmp_path, monkeypatch, capsys):
    def load(_: object) -> None:
        raise AssertionError("a model was loaded")

    for module in (compress, decompress, evaluate, roundtrip):
        monkeypatch.setattr(module, "open_codec", load)
    for command in [
        ("eval", "modes", tmp_path, "--out", tmp_path / "o"),
        ("eval", "modes", tmp_path, "--out", tmp_path / "o", "--steps", "1,x"),
        ("eval", "captions", tmp_path, "--out", tmp_path / "o"),
        ("compress", picture, tmp_path / "none" / "a.pcv2"),
        ("compress", picture, tmp_path / "a.pcv2", "--draw-seed", 5),
        ("decompress", file, tmp_path / "none" / "a.png"),
        ("decompress", file, tmp_path / "a.pdf"),
        ("roundtrip", picture, "--out", tmp_path),
        ("roundtrip", picture, "--out", picture / "x"),
        ("eval", "kodak", tmp_path, "--out", tmp_path),
        ("eval", "kodak", tmp_path, "--out", tmp_path / "o", "--baselines", "gif"),
    ]:
        failure(capsys, *command)


def test_faults_of_torch_while_working_are_one_line(
    picture, random_model, tmp_path, monkeypatch, capsys
):
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("percov2.models.tiny.torch.backbone.TinyTorchModel.encode_tokens", fail)
    command = ("compress", picture, tmp_path / "o.pcv2", "--model", random_model)
    assert f"{picture}: CUDA out of memory. Tried" in failure(capsys, *command)


@pytest.mark.parametrize("part", ["autoencoder", "fine/quantizer", "fine/entropy"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_models_are_one_line(part, name, picture, random_model, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(random_model, model)
    path = model / part / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = failure(capsys, "compress", picture, tmp_path / "o.pcv2", "--model", model)
    assert str(model / part) in message


def test_interruption_is_status_130(monkeypatch, file):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "read_file", interrupt)
    assert run("info", file) == 130


WRONG_NUMBERS = [
    *(("--steps", value) for value in ("0", "1001", "1.5", "x")),
    *(("--guidance", value) for value in ("-0.1", "101", "nan", "inf", "x")),
    *(("--seed", value) for value in ("-1", str(2**63), "x")),
]


def test_wrong_usage_is_status_2(capsys):
    sampling = ["decompress", "a", "b.png"]
    numbers = [
        *([*sampling, option, value] for option, value in WRONG_NUMBERS),
        *([command, "a", "b", "--max-pixels", "0"] for command in ("compress", "decompress")),
    ]
    others = [[], ["compress"], ["train"], ["nonsense"], ["info", "a", "--nonsense"]]
    for arguments in numbers + others:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert ("must be" in said) == (arguments in numbers)


def test_failures_have_no_traceback(tmp_path):
    result = subprocess_run("-m percov2 info", tmp_path / "none.pcv2")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"percov2: {tmp_path / 'none.pcv2'}: No such file or directory\n"


def test_a_full_or_closed_stdout_is_one_line(file, picture, random_model):
    compressing = ("-m percov2 compress", picture, "-", "--model", random_model)
    for command in (("-m percov2 info", file), compressing):
        with open("/dev/full", "wb") as full:
            result = subprocess_run(*command, stdout=full)
        assert result.stderr == "percov2: standard output: No space left on device\n"
        assert result.returncode == 2
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as pipe:
        result = subprocess_run("-m percov2 info", file, stdout=pipe)
    assert result.stderr == "percov2: standard output: Broken pipe\n"
    assert result.returncode == 2


TRIED = """
import json, sys
from percov2.cli.main import main

for command in json.load(sys.stdin):
    try:
        status = main(command)
    except SystemExit as stop:
        status = stop.code
    heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
    print(json.dumps([status, sorted(heavy)]))
"""


def test_wrong_options_are_reported_before_torch_is_loaded(picture, file, random_model, tmp_path):
    out, none = tmp_path / "o.pcv2", tmp_path / "none"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{")
    compressing = ("compress", picture, out)
    folders = ("--out", tmp_path / "out")
    commands = {
        (*compressing, "--rate", "r9"): "model tiny: unknown rate 'r9'; model tiny has r031",
        (*compressing, "--model", random_model, "--rate", "r031"): "model random has fine, coarse",
        (*compressing, "--schedule", "spiral"): "unknown schedule 'spiral'; choose one of qlds12",
        (*compressing, "--model", none): f"no model '{none}'",
        (*compressing, "--model", damaged): f"{damaged / 'config.json'}: ",
        (*compressing, "--model", f"sd3:{random_model}"): "holds a 'tiny' model, not a 'sd3' one",
        (*compressing, "--device", "abacus"): "unknown device 'abacus'",
        (*compressing, "--no-t5", "--offload"): "this small model does not accept",
        (*compressing, "--dtype=bf16"): "dtype 'bf16' is not one of tiny",
        (*compressing, "--vae-tiling", "--compile"): "this small model does not accept",
        (*compressing, "--draw-seed", 5): "--draw-seed needs --stages or --target-bytes",
        (*compressing, "--stages", 2, "--target-bytes", 99): "not allowed with argument",
        (*compressing, "--caption", "a", "--captioner", "none"): "does not accept a caption",
        (*compressing, "--captioner", "text"): "captioner 'text' needs a caption",
        (*compressing, "--captioner-model", "a/b"): "captioner 'none' has no network",
        ("compress", none, out): f"{none}: No such file or directory",
        ("decompress", file, tmp_path / "o.png", "--realism", 1): "leave --realism out",
        (*compressing, "--dev", "cpu"): "percov2 compress: unrecognized arguments: --dev cpu",
        ("eval", "stages", none, *folders, "--x"): "percov2 eval stages: unrecognized arguments",
        ("info", file, "--device", "cuda"): "only --verify reads --device",
        ("info", file, "--verify", "--model", none): f"no model '{none}'",
        ("roundtrip", none, *folders): f"{none}: No such file or directory",
        ("roundtrip", picture, *folders, "--rate", "r9"): "unknown rate 'r9'",
        ("roundtrip", picture, *folders, "--draw-seed", 5): "--draw-seed needs --stages",
        ("eval", "kodak", none, *folders): f"{none}: No such file or directory",
        ("eval", "kodak", tmp_path, *folders, "--schedule", "spiral"): "unknown schedule 'spiral'",
        ("eval", "stages", none, *folders): f"{none}: No such file or directory",
        ("eval", "realism", none, *folders): f"{none}: No such file or directory",
        ("eval", "modes", tmp_path, *folders, "--realism", "0,1"): "no realism dial",
        ("eval", "captions", tmp_path, *folders, "--rate", "r9"): "unknown rate 'r9'",
        ("train", "codec", "--config", none, "--data", tmp_path, *folders): f"{none}: No such file",
        ("eval", "entropy", "--data", none, *folders): f"{none}: No such file or directory",
        (
            "eval",
            "entropy",
            "--data",
            none,
            *folders,
            "--finetune",
            1,
        ): "needs --entropy-run",
    }
    script = tmp_path / "tried.py"
    script.write_text(TRIED)
    given = json.dumps([[str(word) for word in command] for command in commands])
    result = subprocess_run(str(script), stdin=given)
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert answers == [[2, []]] * len(commands)
    lines = result.stderr.splitlines()
    for command, line in zip(commands, lines, strict=True):
        assert commands[command] in line, command
    assert not out.exists() and not (tmp_path / "out").exists()


def test_names_cannot_write_to_the_terminal(tmp_path, file, capsys):
    odd = tmp_path / "a\x1b[31m\n\u202eb.pcv2"
    message = failure(capsys, "info", odd)
    assert "a\\x1b[31m\\n\\u202eb.pcv2: No such file" in message
    odd.write_bytes(file.read_bytes())
    shown = output(capsys, "info", odd)
    assert "\x1b" not in shown and "\u202e" not in shown


@pytest.mark.parametrize("name", ["model", "rate"])
def test_names_of_models_and_rates_cannot_write_to_the_terminal(name, picture, tmp_path, capsys):
    line = failure(
        capsys, "compress", picture, tmp_path / "o.pcv2", f"--{name}", "a\x1b[31m\n\u202eb"
    )
    assert "a\\x1b[31m\\n\\u202eb" in line


def test_roundtrip_escapes_names(picture, random_model, tmp_path, capsys):
    odd = picture.rename(tmp_path / "a\x1b[31m\n\u202eb.png")
    said = output(capsys, "roundtrip", odd, "--out", tmp_path / "out", "--model", random_model)
    assert "a\\x1b[31m\\n\\u202eb.png: " in said and "\x1b" not in said


def test_warnings_as_errors_are_no_traceback(tmp_path):
    clear, out = tmp_path / "clear.png", tmp_path / "o.pcv2"
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(clear)
    result = subprocess_run("-m percov2 compress", clear, out, PYTHONWARNINGS="error")
    assert "Traceback" not in result.stderr and result.returncode in (0, 2)
    assert out.exists() == (result.returncode == 0)


def test_messages_of_the_parser_are_printable(capsys):
    for words in (["--stages", "\x1b[31m"], ["--x\x1b[31m\r"]):
        with contextlib.suppress(SystemExit):
            main(["compress", "a.png", "b.pcv2", *words])
        said = capsys.readouterr().err
        assert "\\x1b[31m" in said and "\x1b" not in said and "\r" not in said
