"""Reports on several rates: what is done once, what is done again, and what the page says."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from percov2.codec import Codec
from percov2.container.captions import TextCaptioner
from percov2.evaluation import comparisons, rates, report
from percov2.evaluation.baselines import BASELINES, Baseline
from percov2.evaluation.figures import measured_points
from percov2.evaluation.report_page import names_of
from percov2.options import DecodeOptions
from tools import random_model as builder
from tools.command_line import failure, run
from tools.docs_scripts import script
from tools.photos import noise


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, size in enumerate([(48, 64), (64, 40)]):
        noise(*size, seed=i).save(folder / f"photo{i + 1}.png")
    return folder


@pytest.fixture
def calls(monkeypatch) -> dict[str, list[object]]:
    """The pictures that percov2 compressed, and the names and sizes of classical codecs' work."""
    found: dict[str, list[object]] = {"percov2": [], "codecs": []}
    compress, within = report.compress, comparisons.attempts_within

    def counted(codec, picture, setting):
        found["percov2"].append((setting.encode.rate, picture.size))
        return compress(codec, picture, setting)

    def attempts(name, picture, size):
        found["codecs"].append((name, picture.size, size))
        return within(name, picture, size)

    monkeypatch.setattr(report, "compress", counted)
    monkeypatch.setattr(comparisons, "attempts_within", attempts)
    monkeypatch.setitem(BASELINES, "flat", FLAT)
    return found


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """Leave out the figure and the HTML page, which take most of a test's time."""
    monkeypatch.setattr(rates, "rates_figure", lambda *_, **__: None)
    monkeypatch.setattr(rates, "write_html", lambda *_: None)


def _flat(picture: Image.Image, level: int) -> bytes:
    """Return the mean colour in three bytes, with more bytes at higher qualities."""
    mean = np.asarray(picture).mean((0, 1)).round().astype(np.uint8)
    return mean.tobytes() + bytes(level)


FLAT = Baseline(
    _flat, lambda data, size: Image.new("RGB", size, tuple(data[:3])), lambda: True, "nothing"
)
"""A codec that has a file of few bytes, which those of the random model allow."""
MORE = report.Setting(decode=DecodeOptions(steps=1))


def evaluated(codec, photos, out, setting=MORE, names=(), **more):
    said: list[str] = []
    more = {"say": said.append, "progress": False, **more}
    return rates.evaluate_rates(codec, photos, out, setting, names, ["flat"], **more), said


def compressed(calls) -> list[tuple[str, tuple[int, int]]]:
    """What was compressed since the last call, without the grey pictures that warm up."""
    found = [one for one in calls["percov2"] if one[1] != (64, 64)]
    calls["percov2"].clear()
    return found


def test_a_report_has_every_rate(codec, photos, tmp_path, calls):
    out = tmp_path / "out"
    result, said = evaluated(codec, photos, out, command="percov2 eval report FOLDER")
    assert said == []
    sizes = [(48, 64), (64, 40)]
    assert compressed(calls) == [(rate, size) for rate in ("fine", "coarse") for size in sizes]
    assert json.loads((out / "report.json").read_text()) == result
    assert result["command"] == "percov2 eval report FOLDER"
    page = (out / "report.md").read_text()
    assert "- Photos: photo1–2." in page and "```sh\npercov2 eval report FOLDER\n```" in page
    for name, one in result["rates"].items():
        assert one == json.loads((out / name / "report.json").read_text())
        sizes = [(out / name / f"photo{i}.pcv2").stat().st_size for i in (1, 2)]
        assert [record["bytes"] for record in one["images"]] == sizes
        mean = np.mean(sizes)
        assert one["mean"]["bytes"] == mean
        assert f"| `{name}` | {mean:,.0f} | {one['mean']['bpp']:.4f} |" in page
        assert f"## `{name}`, model id {codec.model_id(name):04x}, 1 step\n" in page
        assert f"| percov2 {name} | {mean:,.0f} |" in page
        assert "flat, on … of 2 |" in page.partition(f"## `{name}`")[2]
    systems = {point.system for point in measured_points([out / "fine" / "report.json"])[0]}
    assert systems == {"percov2 random", "flat"}
    text = (out / "report.html").read_text()
    assert text.count("<section>") == 2 and "percov2 coarse" in text and "percov2 fine" in text
    for name in ("curves.png", "rates.jpg", "classical.jpg"):
        assert f"]({name})" in page
        with Image.open(out / name) as picture:
            picture.load()
    with Image.open(out / "rates.jpg") as picture:  # three photos of 64 pixels // 3
        assert picture.width == 3 * 21 + 2 * 6


def test_a_run_resumes_at_the_first_unfinished_rate(codec, photos, tmp_path, calls, undrawn):
    out = tmp_path / "out"
    first, _ = evaluated(codec, photos, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    compressed(calls)
    calls["codecs"].clear()
    again, said = evaluated(codec, photos, out)
    assert again == first and compressed(calls) == [] and calls["codecs"] == []
    assert [line.partition(" is finished")[0] for line in said] == ["fine", "coarse"]
    assert {path: path.read_bytes() for path in before} == before
    (out / "coarse" / "report.json").unlink()
    _, said = evaluated(codec, photos, out)
    assert {rate for rate, _ in compressed(calls)} == {"coarse"} and calls["codecs"] == []
    assert len(said) == 1 and said[0].startswith("fine is finished")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steps", "fine is evaluated again: steps was 1 and is 2"),
        ("max_pixels", "fine is evaluated again: options differs in"),
        ("caption", "fine is evaluated again: options differs in captioner text"),
        ("photo", "fine is evaluated again: photos differs in photo2.png"),
        ("name", "fine is evaluated again: photos differs in photo2.png, photo3.png"),
        ("codec", "fine is evaluated again: codecs was ['flat'] and is []"),
        ("version", "fine is evaluated again: percov2 was '0.0' and is"),
    ],
)
def test_a_change_repeats_a_rate_and_is_named(
    codec, photos, tmp_path, calls, change, said, undrawn
):
    out = tmp_path / "out"
    setting = MORE
    if change == "caption":
        setting = dataclasses.replace(MORE, captioner=TextCaptioner("a cat"))
    evaluated(codec, photos, out, setting, ["fine"])
    compressed(calls)
    if change == "caption":
        setting = dataclasses.replace(MORE, captioner=TextCaptioner("a dog"))
    elif change == "steps":
        setting = report.Setting(decode=DecodeOptions(steps=2))
    elif change == "max_pixels":
        setting = dataclasses.replace(MORE, decode=DecodeOptions(steps=1, max_pixels=10**6))
    elif change == "photo":
        noise(64, 40, seed=9).save(photos / "photo2.png")
    elif change == "name":
        (photos / "photo2.png").rename(photos / "photo3.png")
    elif change == "codec":
        absent = dataclasses.replace(FLAT, available=lambda: False)
        BASELINES["flat"] = absent
    else:
        path = out / "fine" / "report.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "percov2": "0.0"}))
    result, lines = evaluated(codec, photos, out, setting, ["fine"])
    assert len(lines) == 1 and lines[0].startswith(said)
    assert len(compressed(calls)) == 2
    assert result["rates"]["fine"] == json.loads((out / "fine" / "report.json").read_text())


def test_other_weights_repeat_percov2_but_not_the_codecs(
    random_model, codec, photos, tmp_path, calls, undrawn
):
    """The second model restores other pictures from files of the same size."""
    other = shutil.copytree(random_model, tmp_path / "other")
    fresh = builder.build(tmp_path / "fresh", seed=1)
    shutil.rmtree(other / "flow")
    shutil.copytree(fresh / "flow", other / "flow")
    changed = Codec(Codec.from_pretrained(other).model, captions=None)
    kept = tmp_path / "kept"
    first, _ = evaluated(codec, photos, tmp_path / "a", kept=kept)
    assert len(calls["codecs"]) == 4
    compressed(calls)
    calls["codecs"].clear()
    second, _ = evaluated(changed, photos, tmp_path / "b", kept=kept)
    assert len(compressed(calls)) == 4 and calls["codecs"] == []
    for rate, one in second["rates"].items():
        before = first["rates"][rate]
        assert one["baselines"]["flat"]["images"] == before["baselines"]["flat"]["images"]
        assert one["mean"]["bytes"] == before["mean"]["bytes"]
        assert one["mean"]["psnr"] != before["mean"]["psnr"]
        assert one["weights"] != before["weights"]
    # The kept picture is that of the codec.
    cells = report.pictures_of(second["rates"]["fine"], tmp_path / "b" / "fine", "photo1.png")
    with Image.open(photos / "photo1.png") as photo:
        mean = np.asarray(photo).mean((0, 1)).round()
    assert cells[2][0] == "flat" and (np.asarray(cells[2][1]) == mean).all()
    evaluated(changed, photos, tmp_path / "a", names=["fine"], kept=kept)
    assert calls["codecs"] == []


def test_kept_results_belong_to_a_photo_a_size_and_a_set_of_measures(tmp_path, calls):
    store = comparisons.Comparisons(tmp_path / "kept")
    photo, other = (comparisons.Original(np.asarray(noise(48, 64, seed=i))) for i in (0, 1))
    first = store.within("flat", photo, 40, ["psnr"])
    again = store.within("flat", photo, 40, ["psnr"])
    assert len(calls["codecs"]) == 1 and first is not None and again is not None
    assert again.record == first.record and again.distance == first.distance
    assert again.shown.tobytes() == first.shown.tobytes()
    assert store.within("flat", photo, 2, ["psnr"]) is None
    assert store.within("flat", photo, 2, ["psnr"]) is None
    assert len(calls["codecs"]) == 2
    for change in ((other, 40, ["psnr"]), (photo, 41, ["psnr"]), (photo, 40, ["psnr", "dists"])):
        store.within("flat", *change)
    assert len(calls["codecs"]) == 5
    comparisons.Comparisons().within("flat", photo, 40, ["psnr"])
    assert len(calls["codecs"]) == 6


def test_rivals_run_once_for_all_rates(codec, photos, tmp_path, calls, undrawn):
    outputs = tmp_path / "theirs"
    outputs.mkdir()
    for i in (1, 2):
        shutil.copy(photos / f"photo{i}.png", outputs)
    (outputs / "bpp.csv").write_text("name,bytes\nphoto1,300\nphoto2,200\n")
    rivals = report_rivals(outputs)
    result, _ = evaluated(codec, photos, tmp_path / "out", rivals=rivals)
    assert [one["baselines"]["theirs"]["mean"]["bytes"] for one in result["rates"].values()] == [
        250,
        250,
    ]
    page = (tmp_path / "out" / "report.md").read_text()
    section = page.partition("## Other systems")[2]
    assert page.count("| theirs | 250 |") == section.count("| theirs | 250 |") == 1
    assert "| percov2 fine |" in section and "| percov2 coarse |" in section
    (outputs / "bpp.csv").write_text("name,bytes\nphoto1,400\nphoto2,200\n")
    result, said = evaluated(codec, photos, tmp_path / "out", rivals=rivals)
    assert [line.partition(":")[0] for line in said] == [
        "fine is evaluated again",
        "coarse is evaluated again",
    ]
    assert result["rates"]["fine"]["baselines"]["theirs"]["mean"]["bytes"] == 300


def report_rivals(outputs: Path) -> list:
    from percov2.evaluation.rivals import Folder

    return [Folder("theirs", outputs)]


def test_the_command_line_writes_the_report(photos, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ("eval", "report", photos, "--out", out, "--model", random_model, "--steps", 1)
    assert run(*command, "--rates", "coarse", "--published", "Kodak") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [str(out / "report.md")]
    result = json.loads((out / "report.json").read_text())
    assert list(result["rates"]) == ["coarse"] and result["published"] == "Kodak"
    assert result["command"] == (
        "percov2 eval report FOLDER --model random --out OUT --rates coarse --published Kodak "
        "--steps 1"
    )
    assert not (out / "fine").exists()
    assert "not measured here" in (out / "report.html").read_text()
    assert run(*command) == 0
    captured = capsys.readouterr()
    assert "coarse is finished; its results" in captured.err
    assert list(json.loads((out / "report.json").read_text())["rates"]) == ["fine", "coarse"]


def test_the_pages_take_their_numbers_from_a_report(codec, photos, tmp_path, calls):
    result, _ = evaluated(codec, photos, tmp_path / "out")
    figures = script("update_figures")
    root, mark = tmp_path / "clone", "<!--kodak:{}-->{}<!--/-->".format
    for place in (figures.PAGE, *figures.PLACES):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(f"{mark('fine.bytes', 1)} and {mark('coarse.flat.psnr', 0.5)}")
    (root / figures.PAGE).write_text(f"# Kodak\n\nHand {mark('page', 'old')} written\n")
    (root / "README.md").write_text(f"{mark('means', '')} on {mark('photos', 'some')}")
    (root / "docs" / "images").mkdir()
    report_file = tmp_path / "out" / "report.json"
    assert len(figures.update(report_file, root)) == 1 + len(figures.PLACES)
    page = (root / figures.PAGE).read_text()
    assert page.startswith("# Kodak\n\nHand <!--kodak:page-->\n") and "old" not in page
    assert page.endswith("<!--/--> written\n") and "# random" not in page
    for name in ("curves.png", "rates.jpg", "classical.jpg"):
        copy = root / "docs" / "images" / f"kodak_{name}"
        assert f"](../images/{copy.name})" in page
        assert copy.read_bytes() == (tmp_path / "out" / name).read_bytes()
    fine, coarse = result["rates"]["fine"], result["rates"]["coarse"]
    psnr = coarse["baselines"]["flat"]["mean"]["psnr"]
    text = (root / "docs" / "how-to" / "target-bytes.md").read_text()
    size = f"{fine['mean']['bytes']:.0f}"
    assert text == f"{mark('fine.bytes', size)} and {mark('coarse.flat.psnr', f'{psnr:.1f}')}"
    text = (root / "README.md").read_text()
    assert f"| `coarse` | {coarse['mean']['bytes']:.0f} |" in text and ">photo1–2<" in text
    facts = figures.facts_of(page)
    for metric, count in fine["baselines"]["flat"]["wins"].items():
        assert facts[f"fine.flat.wins.{metric}"] == ("–" if count is None else str(count))
    assert figures.update(None, root) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--rates", "fine,medium"), "medium"),
        (("--rates", "fine,fine"), "a rate is named twice"),
        (("--baselines", "gif"), "unknown baselines"),
        (("--published", "Kodiak"), "no published points of 'Kodiak'"),
    ],
)
def test_wrong_choices_are_known_before_a_model_is_loaded(
    photos, random_model, tmp_path, monkeypatch, capsys, options, said
):
    def load(_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("percov2.cli.evaluate.open_codec", load)
    command = ("eval", "report", photos, "--out", tmp_path / "out", "--model", random_model)
    assert said in failure(capsys, *command, *options)


def test_photos_are_never_overwritten(codec, photos, calls):
    noise(48, 64).save(photos / "rates.jpg")
    (photos / "photo1.png").rename(photos / "a.png")
    with pytest.raises(ValueError, match=r"rates\.jpg: it is the same file as the input"):
        evaluated(codec, photos, photos)


def test_photos_are_named_by_a_range():
    assert names_of(["kodim09.png", "kodim10.png"]) == "kodim09–10"
    for images in (["a1.png", "a3.png"], ["a1.png", "b2.png"], ["a.png", "1.png"]):
        assert names_of(images) == "2 photos"
    assert names_of(["a1.png"]) == "1 photo"
