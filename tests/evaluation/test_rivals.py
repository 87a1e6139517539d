"""Rivals: external commands and folders, their faults, and their place in a report."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.evaluation import report, vvc
from percov2.evaluation.baselines import BASELINES
from percov2.evaluation.metrics import psnr
from percov2.evaluation.rivals import Command, Folder, RivalError, check_names, parse_rivals
from percov2.options import DecodeOptions
from tools.command_line import failure, output
from tools.photos import noise

CODER = """
import sys
from PIL import Image
quality, source, bits, out = sys.argv[1:]
picture = Image.open(source)
picture.save(bits, "JPEG", quality=int(quality))
Image.open(bits).save(out)
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(48, 64), (64, 40)]):
        noise(*size, seed=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def outputs(photos, tmp_path) -> Path:
    """The folder of a rival that returned darker pictures."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    for path in photos.iterdir():
        Image.open(path).point(lambda level: level // 2).save(folder / path.name)
    (folder / "bpp.csv").write_text("name,bytes\n0,300\n1.png,200\nother,5\n")
    return folder


def python(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def command(code: str, marks: str = "{in} {bits} {out}", limit: float = 60) -> Command:
    (rival,) = parse_rivals(f"x={python(code)} {marks}", limit)
    assert isinstance(rival, Command)
    return rival


def test_a_command_and_a_folder_are_measured_like_other_codecs(
    photos, outputs, random_model, tmp_path, capsys
):
    out = tmp_path / "out"
    rivals = (f"mine:5,60={python(CODER)} {{q}} {{in}} {{bits}} {{out}}", f"dark={outputs}")
    common = ("eval", "kodak", photos, "--out", out, "--model", random_model, "--steps", 1)
    output(capsys, *common, "--rival", rivals[0], "--rival", rivals[1], "--baselines", "jpeg")
    found = json.loads((out / "report.json").read_text())["baselines"]
    assert [(name, entry["kind"]) for name, entry in found.items()] == [
        ("jpeg", "codec"),
        ("mine 5", "command"),
        ("mine 60", "command"),
        ("dark", "folder"),
    ]
    assert found["dark"]["source"] == "outputs"
    assert found["mine 5"]["source"].endswith(" 5 {in} {bits} {out}")
    assert [row["bytes"] for row in found["dark"]["images"]] == [300, 200]
    for name, quality in (("mine 5", 5), ("mine 60", 60)):
        for row, path in zip(found[name]["images"], sorted(photos.iterdir()), strict=True):
            picture, coded = Image.open(path), tmp_path / "coded.jpg"
            picture.save(coded, quality=quality)
            assert row["image"] == path.name and row["bytes"] == coded.stat().st_size
            assert row["bpp"] == 8 * row["bytes"] / (picture.width * picture.height)
            restored = np.asarray(Image.open(coded))
            assert row["psnr"] == pytest.approx(psnr(np.asarray(picture), restored))
            assert 0 < row["seconds"] < 60
    page = (out / "report.md").read_text()
    first, second = page.split("## Other systems, each at its own number of bytes")
    second = second.partition("## Pictures")[0]
    assert "mine" not in first and "| dark | 250 |" in second and "| jpeg " not in second
    with Image.open(photos / "0.png") as original, Image.open(out / "0_compare.png") as row:
        assert row.width == 5 * original.width + 4 * 8  # JPEG has no file as small as percov2's


def test_pictures_of_a_report_are_those_of_its_files(codec, photos, outputs, tmp_path):
    setting = report.Setting(decode=DecodeOptions(steps=1))
    rivals = [Folder("dark", outputs)]
    result = report.evaluate(codec, photos, tmp_path / "out", setting, (), False, rivals)
    cells = report.pictures_of(result, tmp_path / "out", "1.png")
    assert [label for label, _ in cells] == ["original", f"percov2 {result['rate']}", "dark"]
    files = (photos / "1.png", tmp_path / "out" / "1.png", outputs / "1.png")
    for (_, picture), path in zip(cells, files, strict=True):
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(Image.open(path)))
    Image.new("RGB", (101, 40)).save(tmp_path / "out" / "1_compare.png")
    with pytest.raises(ValueError, match="does not show 3 pictures: original, percov2"):
        report.pictures_of(result, tmp_path / "out", "1.png")


def test_a_codec_that_is_not_installed_is_reported_with_its_install_line(
    photos, random_model, tmp_path, monkeypatch, capsys
):
    absent = BASELINES["jpegxl"].__class__(
        *(None, None, lambda: False),  # type: ignore[arg-type]
        BASELINES["jpegxl"].install,
    )
    monkeypatch.setitem(BASELINES, "jpegxl", absent)
    out = tmp_path / "out"
    common = ("eval", "kodak", photos, "--out", out, "--model", random_model, "--steps", 1)
    line = "jpegxl was not measured: it is not installed (pip install pillow-jxl-plugin)"
    assert line in output(capsys, *common, "--baselines", "jpegxl").splitlines()
    result = json.loads((out / "report.json").read_text())
    assert line in result["notes"] and result["baselines"] == {}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit('no GPU: ' + 'x' * 5 + ' found')", "status 1: no GPU: xxxxx found"),
        ("import sys; sys.exit(3)", "status 3 and wrote nothing to stderr"),
        ("pass", r"wrote nothing to \{bits\}"),
        ("import sys; open(sys.argv[2], 'w').write('x')", r"did not write \{out\}"),
        ("import sys; [open(name, 'w').write('x') for name in sys.argv[2:]]", "not a picture"),
        (
            "import sys; from PIL import Image; open(sys.argv[2], 'w').write('x'); "
            "Image.new('RGB', (8, 7)).save(sys.argv[3])",
            "has 8x7 pixels, not 8x8",
        ),
    ],
)
def test_a_command_that_fails_says_why(code, said):
    with pytest.raises(RivalError, match=rf"x on photo\.png: .*{said}"):
        command(code).restore(Image.new("RGB", (8, 8)), Path("photo.png"))


def test_a_command_that_hangs_is_stopped_with_what_it_started(tmp_path):
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]);"
    started = time.monotonic()
    with pytest.raises(RivalError, match=r"took more than 0\.5 s"):
        command(f"{code} time.sleep(60)", limit=0.5).restore(Image.new("RGB", (8, 8)), Path("a"))
    assert time.monotonic() - started < 20
    time.sleep(2.5)
    assert not mark.exists()


def test_a_command_runs_without_a_shell(tmp_path):
    """What a shell would run is an argument like any other."""
    written = "import sys; open(sys.argv[2], 'w').write(sys.argv[4]); Image.open(sys.argv[1])"
    code = f"from PIL import Image; {written}.save(sys.argv[3])"
    rival = command(code, "{in} {bits} {out} '$(date); > x'")
    attempt, _ = rival.restore(Image.new("RGB", (8, 8), "red"), Path("a.png"))
    assert attempt.size == len("$(date); > x")
    assert attempt.restored.getpixel((3, 3)) == (255, 0, 0)


def test_commands_that_do_not_exist_are_named():
    (rival,) = parse_rivals("x=/no/such/program {in} {bits} {out}")
    with pytest.raises(RivalError, match=r"a\.png: /no/such/program: No such file"):
        rival.restore(Image.new("RGB", (8, 8)), Path("a.png"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "is not NAME=COMMAND"),
        ("=cmd {in} {bits} {out}", "is not NAME=COMMAND"),
        ("x=cmd {in} {out}", "neither a folder nor a command"),
        ("x=/no/such/folder", "neither a folder nor a command"),
        ("x=cmd {q} {in} {bits} {out}", "needs points in the name, like x:1,2="),
        ("x:1,2=cmd {in} {bits} {out}", r"needs \{q\} in the command"),
        ("x:1,1=cmd {q} {in} {bits} {out}", "different operating points"),
        ("x:1,=cmd {q} {in} {bits} {out}", "different operating points"),
        ("x=cmd '{in} {bits} {out}", "not complete: No closing quotation"),
        ("a|b=cmd {in} {bits} {out}", r"printable and without \|"),
    ],
)
def test_texts_that_are_no_rival_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        parse_rivals(text)


def test_points_may_be_folders(tmp_path):
    for point in ("low", "high"):
        (tmp_path / point).mkdir()
    rivals = parse_rivals(f"x:low,high={tmp_path}/{{q}}")
    assert rivals == [Folder("x", tmp_path / point, point) for point in ("low", "high")]
    assert [rival.name for rival in rivals] == ["x low", "x high"]


def test_names_are_unique():
    (one,) = parse_rivals("x={in} {bits} {out}")
    check_names([one])
    taken = (("vvc", ""), ("vvc", "1"), ("percov2 tiny", ""), ("original", ""))
    named = ([Command(system, ("x",), point=point)] for system, point in taken)
    for others in ([one, one], *named):
        with pytest.raises(ValueError, match="is used twice"):
            check_names(others)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", r"bpp\.csv: the first line must be name,bytes or name,bpp"),
        ("name,size\n0,3\n", r"bpp\.csv: the first line must be"),
        ("name,bytes\n0,3\n", r"bpp\.csv: no row for 1"),
        ("name,bytes\n0,3\n1,3.5\n", r"bpp\.csv, line 3: '1,3.5' is not name,bytes"),
        ("name,bpp\n0,0.1\n1,nan\n", r"bpp\.csv, line 3"),
        ("name,bpp\n0,-0.1\n1,1\n", r"bpp\.csv, line 2"),
        ("name,bytes\n0\n1,2\n", r"bpp\.csv, line 2"),
        ("name,bytes\n0,1\n0,2\n1,2\n", r"bpp\.csv, line 3: 0 has two rows"),
    ],
)
def test_tables_that_do_not_fit_are_refused(outputs, photos, table, said):
    (outputs / "bpp.csv").write_text(table)
    with pytest.raises(ValueError, match=said):
        Folder("x", outputs).check(sorted(photos.iterdir()))


def test_bits_per_pixel_become_bytes(outputs, photos):
    (outputs / "bpp.csv").write_text("name,bpp\n0,0.25\n1,0.1\n")
    with Image.open(photos / "0.png") as original:
        attempt, seconds = Folder("x", outputs).restore(original, photos / "0.png")
        assert attempt.size == round(0.25 * original.width * original.height / 8)
        assert seconds is None


def test_faults_of_a_folder_are_known_before_a_model_is_loaded(
    photos, outputs, tmp_path, monkeypatch, capsys
):
    def load(_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("percov2.cli.evaluate.open_codec", load)
    common = ("eval", "kodak", photos, "--out", tmp_path / "out", "--rival", f"x={outputs}")
    Image.new("RGB", (9, 9)).save(outputs / "1.png")
    assert "outputs/1.png: the restored picture has 9x9" in failure(capsys, *common)
    (outputs / "1.png").unlink()
    assert "outputs/1.png is missing" in failure(capsys, *common)
    (outputs / "bpp.csv").unlink()
    assert "bpp.csv: No such file" in failure(capsys, *common)


STAND_INS = {
    "EncoderAppStatic": """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in -i) in=$2;; -wdt) w=$2;; -hgt) h=$2;; -q) qp=$2;; -b) bits=$2;; esac
  shift
done
exec "$FFMPEG" -loglevel error -y -f rawvideo -pix_fmt yuv444p -s "${w}x$h" -i "$in" \\
  -c:v libvvenc -preset faster -qp "$qp" -pix_fmt yuv420p10le -f vvc "$bits"
""",
    "DecoderAppStatic": """#!/bin/sh
while [ $# -gt 0 ]; do case $1 in -b) bits=$2;; -o) out=$2;; esac; shift; done
exec "$FFMPEG" -loglevel error -y -threads 1 -f vvc -i "$bits" \\
  -frames:v 1 -pix_fmt yuv444p -f rawvideo "$out"
""",
}
"""vvenc in the place of VTM's programs."""


def test_the_recipe_of_vtm_runs_with_vvenc_in_its_place(tmp_path, monkeypatch):
    if not vvc.available():
        pytest.skip("this machine has no vvenc")
    from imageio_ffmpeg import get_ffmpeg_exe

    page = Path(__file__).parents[2] / "docs" / "how-to" / "compare-systems.md"
    (script,) = re.findall(r"```sh\n(#!/bin/sh\n# vtm\.sh .*?)```", page.read_text(), re.DOTALL)
    (tmp_path / "vtm.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    python = {"../python3": f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'}
    for name, text in {**STAND_INS, **python}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("VTM", str(tmp_path))
    monkeypatch.setenv("FFMPEG", get_ffmpeg_exe())
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    picture = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8)[:, None, None], (1, 64, 3)))
    (line,) = re.findall(r"--rival '(VTM:.*?)'", page.read_text())
    text = line.replace("41,45,49,52", "30,50").replace("vtm.sh", str(tmp_path / "vtm.sh"))
    good, bad = (rival.restore(picture, Path("a.png"))[0] for rival in parse_rivals(text))
    assert good.size > bad.size > 20
    values = [psnr(np.asarray(picture), np.asarray(attempt.restored)) for attempt in (good, bad)]
    assert values[0] > values[1] > 25
