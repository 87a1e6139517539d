"""Commands with several inputs: folders, patterns, pipes, URLs, faults and their exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2 import Codec
from percov2.places import exists, open_for_writing, read
from tools.command_line import failure, output, run, subprocess_run
from tools.photos import noise


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five pictures of several sizes in two folders, one damaged, and other files."""
    top = tmp_path / "photos"
    for i, name in enumerate(["a.png", "b.jpg", "sub/a.webp", "sub/deep/d.png", "sub/e.BMP"]):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        noise(40 + 9 * i, 30 + 5 * i).save(top / name)
    (top / ".bin").mkdir()
    for name in ("notes.txt", ".hidden.png", "sub/._a.webp", ".bin/f.png"):
        (top / name).write_text("no picture")
    return top


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_mirrored_and_restored(folder, random_model, tmp_path, capsys):
    codec, model = Codec.from_pretrained(random_model), ("--model", random_model)
    small, report = tmp_path / "small", tmp_path / "report.jsonl"
    options = ("--rate", "coarse", "--jobs", 3)
    assert run("compress", "-r", folder, "-o", small, "--report", report, *model, *options) == 0
    names = ["a", "b", "sub/a", "sub/deep/d", "sub/e"]
    assert files(small) == [name + ".pcv2" for name in names]
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(records) == 5
    for record in records:
        data = Path(record["output"]).read_bytes()
        assert data == codec.compress(record["input"], rate="coarse")
        with Image.open(record["input"]) as image:
            size = {"width": image.width, "height": image.height}
        bpp = 8 * len(data) / (size["width"] * size["height"])
        assert record == {
            "input": record["input"],
            "output": record["output"],
            "bytes": len(data),
            "bpp": bpp,
            **size,
        }
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"5 of 5 pictures, {sum(r['bytes'] for r in records)} bytes, ")
    bpp = sum(8 * r["bytes"] for r in records) / sum(r["width"] * r["height"] for r in records)
    assert f" bytes, {bpp:.4f} bpp, " in said.err
    assert "2 other files ignored" not in said.err and "1 other files ignored" in said.err
    back = tmp_path / "back"
    assert run("decompress", "-r", small, "-o", back, *model, "--seed", 5) == 0
    assert files(back) == [name + ".png" for name in names]
    for name in names:
        with Image.open(back / f"{name}.png") as image:
            expected = codec.decompress(small / f"{name}.pcv2", seed=5)
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_faults_are_reported_and_the_rest_goes_on(folder, random_model, tmp_path, capsys):
    model, report = ("--model", random_model), tmp_path / "report.jsonl"
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    none = folder / "none.png"
    assert run("compress", folder, none, "--report", report, *model) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(": ")[0] for line in said[:2]] == [
        str(folder / "b.jpg"),
        str(none),
    ]
    assert "damaged" in said[0] or "not a picture" in said[0]
    assert said[1].endswith("No such file or directory")
    assert said[2].startswith("1 of 3 pictures") and ", 2 failed" in said[2]
    records = [json.loads(line) for line in report.read_text().splitlines()]
    assert [("error" in one) for one in records] == [False, True, True]
    assert not (folder / "b.pcv2").exists() and (folder / "a.pcv2").exists()
    assert run("compress", none, folder / "x.png", *model) == 2
    assert capsys.readouterr().err.endswith("0 of 2 pictures, 0 bytes, 0.00 pictures/s, 2 failed\n")


def test_outputs_that_exist_are_left_out_if_asked(folder, random_model, tmp_path, capsys):
    model, out = ("--model", random_model), tmp_path / "out/"
    assert run("compress", folder / "a.png", "-o", f"{out}/", *model) == 0
    (out / "b.pcv2").touch()  # empty: as good as missing
    first = (out / "a.pcv2").stat().st_mtime_ns
    capsys.readouterr()
    assert run("compress", folder, "-o", out, "--skip-existing", *model) == 0
    assert "1 of 2 pictures" in (said := capsys.readouterr().err) and "1 skipped" in said
    assert (out / "a.pcv2").stat().st_mtime_ns == first
    assert (out / "b.pcv2").stat().st_size > 0
    # Files of another kind are no results.
    (out / "b.pcv2").write_text("somebody's")
    report = tmp_path / "report.jsonl"
    assert run("compress", folder, "-o", out, "--skip-existing", "--report", report, *model) == 1
    said = capsys.readouterr().err
    assert f"{out / 'b.pcv2'}: it exists and is no .pcv2 file, so it is not replaced" in said
    assert "0 of 2 pictures" in said and "1 failed, 1 skipped" in said
    assert ["error" in json.loads(line) for line in report.read_text().splitlines()] == [0, 1]
    assert (out / "b.pcv2").read_text() == "somebody's"
    (tmp_path / "back").mkdir()
    (tmp_path / "back/a.png").write_text("somebody's")
    back = ("decompress", out / "a.pcv2", "-o", tmp_path / "back", "--skip-existing", *model)
    assert run(*back) == 2
    assert "it exists and is no picture" in capsys.readouterr().err
    skip = ("-o", out, "--skip-existing", *model)
    assert run("compress", folder / "a.png", *skip) == 0  # one input, too
    assert run("compress", folder / "a.png", folder / "none.png", *skip) == 1
    assert (out / "a.pcv2").stat().st_mtime_ns == first
    assert run("compress", folder / "a.png", "-o", out, "--report", report, *model) == 0
    assert json.loads(report.read_text())["output"] == str(out / "a.pcv2")


def test_results_never_replace_what_they_must_not(folder, random_model, tmp_path, capsys):
    model = ("--model", random_model)
    (folder / "a.jpg").write_bytes((folder / "b.jpg").read_bytes())
    before = (folder / "a.png").read_bytes()
    # Two inputs with one output: the first wins.
    assert run("compress", folder, *model) == 1
    assert "a.png: cannot write" in (said := capsys.readouterr().err) and "a.jpg" in said
    # A restored picture is not written over the original, unless it is named.
    assert run("decompress", folder, *model) == 1
    assert "a.png exists and may be the original" in capsys.readouterr().err
    assert (folder / "a.png").read_bytes() == before and (folder / "b.png").exists()
    message = failure(capsys, "decompress", folder / "a.pcv2", *model)
    assert "exists and may be the original" in message
    assert run("decompress", folder / "a.pcv2", folder / "b.png", *model) == 0
    # Somebody else's file with our ending, and a report's name.
    (folder / "b.pcv2").write_text("somebody's")
    assert run("compress", folder / "b.jpg", folder / "sub", *model) == 1
    assert (folder / "b.pcv2").read_text() == "somebody's"
    report = ("--report", folder / "notes.txt")
    message = failure(capsys, "compress", folder, *report, *model)
    assert "notes.txt: it exists and is no report" in message


def test_a_report_is_no_input_and_no_output(folder, tmp_path, capsys):
    out = tmp_path / "out"
    for command, name, said in (
        ((folder,), folder / "a.png", "the same file as the input"),
        ((folder / "a.png",), folder / "sub/../a.png", "the same file as the input"),
        ((folder, "-o", out), out / "b.pcv2", f"the output for {folder / 'b.jpg'}"),
        ((folder / "a.png", out / "x.pcv2"), out / "x.pcv2", "the output for"),
    ):
        message = failure(capsys, "compress", *command, "--report", name)
        assert f"cannot write the report {name}: it is {said}" in message
    assert not out.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_report_on_a_full_disk_is_named(folder, random_model, tmp_path, capsys):
    command = ("compress", folder, "-o", tmp_path / "out", "--model", random_model)
    assert run(*command, "--report", "/dev/full") == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "percov2: /dev/full: No space left on device"
    assert "2 of 2 pictures" in said[-2]


def test_a_folder_of_originals_is_never_restored_over_them(folder, random_model, tmp_path, capsys):
    model = ("--model", random_model)
    assert run("compress", "-r", folder, "-o", folder, *model) == 0
    before = {name: (folder / name).read_bytes() for name in ("a.png", "sub/deep/d.png")}
    (folder / "sub/here").symlink_to(folder)
    places = {folder: 1, f"{folder}/": 2, folder / "sub/here": 2, folder / "sub/..": 2}
    for place, status in places.items():  # only the first restores b.jpg and others
        capsys.readouterr()
        assert run("decompress", "-r", folder, "-o", place, *model) == status
        said = capsys.readouterr().err
        assert said.count("exists and may be the original") >= 2
        assert f"{place}/a.png exists".replace("//", "/") in said
        assert {name: (folder / name).read_bytes() for name in before} == before
    assert "may be the original" in failure(
        capsys, "decompress", folder / "a.pcv2", "-o", folder, *model
    )
    (tmp_path / "links").mkdir()
    (tmp_path / "links/a.png").symlink_to(folder / "a.png")
    message = failure(capsys, "decompress", folder / "a.pcv2", "-o", tmp_path / "links", *model)
    assert "may be the original" in message
    assert {name: (folder / name).read_bytes() for name in before} == before
    # A named picture and results in another folder are replaced.
    out = tmp_path / "out"
    assert run("decompress", folder / "a.pcv2", "-o", folder / "a.png", *model) == 0
    assert (folder / "a.png").read_bytes() != before["a.png"]
    for seed in (1, 2):
        assert run("decompress", "-r", folder, "-o", out, "--seed", seed, *model) == 0
    expected = Codec.from_pretrained(random_model).decompress(folder / "sub/deep/d.pcv2", seed=2)
    with Image.open(out / "sub/deep/d.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_a_caption_and_an_existing_folder_serve_one_input_or_several(
    folder, random_model, tmp_path
):
    codec = Codec.from_pretrained(random_model)
    more = ("-o", tmp_path, "--caption", "a red door", "--model", random_model)
    assert run("compress", folder / "a.png", *more) == 0
    assert run("compress", folder / "b.jpg", folder / "sub/e.BMP", *more) == 0
    for name in "abe":
        (decoded,) = codec.decode([(tmp_path / f"{name}.pcv2").read_bytes()])
        assert decoded.caption == "a red door"


def test_several_inputs_need_a_folder(folder, random_model, tmp_path, capsys):
    model = ("--model", random_model)
    for out in ("-", tmp_path / "one.pcv2", folder / "notes.txt"):
        message = failure(capsys, "compress", folder / "a.png", folder / "b.jpg", "-o", out, *model)
        assert f"-o {out} is no folder, but there are several inputs" in message
    assert run("compress", folder / "a.png", folder / "b.jpg", "-o", tmp_path / "new", *model) == 0
    assert files(tmp_path / "new") == ["a.pcv2", "b.pcv2"]


def test_patterns_are_matched_where_no_shell_does_it(folder, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    pattern = str(folder / "**" / "*.[pw]*")
    assert run("compress", pattern, "-o", out, "--model", random_model) == 0
    assert files(out) == ["a.pcv2", "sub/a.pcv2", "sub/deep/d.pcv2"]
    assert run("compress", str(folder / "*.tif"), "-o", out, "--model", random_model) == 2
    assert "no file there ends in" in capsys.readouterr().err
    odd = folder / "a[1].png"  # a name, not a pattern
    odd.write_bytes((folder / "a.png").read_bytes())
    assert run("compress", odd, "--model", random_model) == 0
    assert (folder / "a[1].pcv2").read_bytes() == (out / "a.pcv2").read_bytes()


def test_pipes_carry_one_picture(picture, random_model, tmp_path):
    codec = Codec.from_pretrained(random_model)
    paths = os.pathsep.join(path for path in sys.path if path)
    model = ["--model", str(random_model)]

    def piped(data: bytes, *words: str) -> bytes:
        command = [sys.executable, "-m", "percov2", *words, *model]
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(
            command, input=data, stdout=subprocess.PIPE, check=True, timeout=120, env=environment
        ).stdout

    data = piped(picture.read_bytes(), "compress", "-", "-")
    assert data == codec.compress(picture)
    shown = piped(data, "decompress", "-", "-o", "-")
    assert shown.startswith(b"\x89PNG")
    (tmp_path / "x.pcv2").write_bytes(data)
    for name in ("-", "/dev/stdout"):
        assert piped(b"", "decompress", str(tmp_path / "x.pcv2"), name) == shown
    (tmp_path / "x.png").write_bytes(shown)
    with Image.open(tmp_path / "x.png") as image:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(codec.decompress(data)))


def test_urls_are_read_and_written(picture, random_model, tmp_path, capsys):
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name in ("in/a.png", "in/sub/b.png", "in/sub/c.txt", "in/.d.png", "in/.bin/e.png"):
        store.pipe_file(f"/photos/{name}", picture.read_bytes())
    model = ("--model", random_model)
    assert run("compress", "-r", "memory://photos/in/", "-o", "memory://photos/out/", *model) == 0
    assert store.find("/photos/out") == ["/photos/out/a.pcv2", "/photos/out/sub/b.pcv2"]
    expected = Codec.from_pretrained(random_model).compress(picture)
    assert store.cat("/photos/out/a.pcv2") == expected
    out = tmp_path / "out.pcv2"
    assert run("compress", "memory://photos/in/a.png", out, *model) == 0
    assert out.read_bytes() == expected
    assert run("decompress", "memory://photos/out/a.pcv2", tmp_path / "a.png", *model) == 0
    assert "8-bit" not in output(capsys, "info", "memory://photos/out/a.pcv2")
    skip = ("--skip-existing", *model)
    assert run("compress", "memory://photos/in/", "-o", "memory://photos/out/", *skip) == 0
    assert "0 of 1 pictures" in (said := capsys.readouterr().err) and "1 skipped" in said
    store.pipe_file("/photos/out/a.pcv2", b"")  # as good as missing
    assert run("compress", "memory://photos/in", "-o", "memory://photos/out/", *skip) == 0
    assert store.cat("/photos/out/a.pcv2") == expected
    store.pipe_file("/photos/in/a.jpg", picture.read_bytes())
    assert run("compress", "memory://photos/in/", *model) == 1
    assert "it is the output for memory:" in capsys.readouterr().err
    small = ("compress", "memory://photos/in/a.png", out, *model, "--max-pixels", 99)
    assert "limit of 99" in failure(capsys, *small)
    assert "ends in .pcv2" in failure(
        capsys, "compress", picture, "-o", "memory://photos/x.png", *model
    ).replace("must end in", "ends in")


def test_warnings_name_their_input(random_model, tmp_path, capsys):
    for name in "abc":
        Image.new("RGBA", (30, 30), (9, 9, 9, 100)).save(tmp_path / f"{name}.png")
    assert run("compress", tmp_path, "--model", random_model) == 0
    said = capsys.readouterr().err.splitlines()
    warned = sorted(line for line in said if "transparency" in line)
    assert [line.split(": ")[1:3] for line in warned] == [
        [str(tmp_path / f"{name}.png"), "warning"] for name in "abc"
    ]


def failing(capsys, status: int, *arguments: object) -> str:
    """What a command prints that ends with a status."""
    capsys.readouterr()
    assert run(*arguments) == status
    return capsys.readouterr().out


@pytest.mark.parametrize("place", ["memory://unfinished", ""])
def test_a_file_that_is_not_finished_gets_no_name(place, tmp_path):
    pytest.importorskip("fsspec")
    name = f"{place or tmp_path}/new/a.tar"

    def write(*parts: bytes | None) -> None:
        with open_for_writing(name) as stream:
            for part in parts:
                stream.write(part)

    with pytest.raises(TypeError):
        write(b"half of it", None)
    assert not exists(name) and not list(tmp_path.rglob("*.part"))
    write(b"all ", b"of it")
    assert read(name, 99) == b"all of it"


def test_info_describes_several_files(file, tmp_path, capsys):
    shown = json.loads(output(capsys, "info", "--json", file, file))
    assert [one["file"] for one in shown] == [str(file)] * 2
    assert shown[0] == json.loads(output(capsys, "info", "--json", file))
    assert len(json.loads(failing(capsys, 1, "info", "--json", file, tmp_path / "none.pcv2"))) == 1
    assert json.loads(failing(capsys, 2, "info", "--json", tmp_path / "x", tmp_path / "y")) == []
    assert run("info", file, tmp_path / "none.pcv2") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(str(file)) and "none.pcv2: No such file" in captured.err


def test_an_interrupted_run_leaves_no_part_and_goes_on(random_model, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    noise(200, 150).save(folder / "000.png")
    count = 400  # they take seconds, so that the signal comes in time
    for i in range(1, count):
        os.link(folder / "000.png", folder / f"{i:03}.png")
    report = tmp_path / "report.jsonl"
    words = ["compress", str(folder), "-o", str(out), "--skip-existing", "--jobs", "2"]
    words += ["--report", str(report)]
    command = [sys.executable, "-m", "percov2", *words, "--model", str(random_model)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    for sent, status in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = len(files(out)) if out.exists() else 0
        running = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # A runner in the background may ignore Ctrl-C, and its children with it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 60
        while (not out.exists() or len(files(out)) < before + 3) and time.monotonic() < deadline:
            time.sleep(0.01)
        running.send_signal(sent)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == status, said
        assert "Traceback" not in said
        if sent == signal.SIGINT:
            written = len(files(out))
            assert f"{written} of {count} pictures" in said
            lines = report.read_text().splitlines()
            assert len({json.loads(line)["output"] for line in lines}) == len(lines) == written
    done = len(files(out))
    assert 6 <= done < count
    assert all(name.endswith(".pcv2") for name in files(out))
    missing = [path for path in folder.iterdir() if not (out / f"{path.stem}.pcv2").exists()]
    for path in missing[20:]:
        path.unlink()
    result = subprocess_run("-m percov2", *words, "--model", random_model)
    assert result.returncode == 0, result.stderr
    left = min(20, len(missing))
    assert f"{left} of {done + left} pictures" in result.stderr
    assert len(files(out)) == done + left
    codec = Codec.from_pretrained(random_model)
    codec.decode([path.read_bytes() for path in sorted(out.iterdir())[::20]])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_fault_of_each_input(folder, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.pcv2").symlink_to("/dev/full")
    assert run("compress", folder, "-o", out, "--model", random_model) == 1
    said = capsys.readouterr().err
    assert "a.pcv2: No space left on device" in said and "1 of 2 pictures" in said
