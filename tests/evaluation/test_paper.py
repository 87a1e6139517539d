"""``percov2 eval paper``: protocols, shards that merge, and reports with every measure."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from percov2 import Codec
from percov2.evaluation import clean_fid, paper
from percov2.evaluation.clip_score import Clip
from percov2.evaluation.figures import measured_points
from percov2.evaluation.metrics import measure
from percov2.evaluation.paper import Judges, Shard, captions_in, photo_list, prepared
from percov2.evaluation.segmentation import ConfusionCounts, Segmenter
from percov2.images import read_image, to_rgb
from tools import tiny_judges
from tools.command_line import failure, output, run
from tools.photos import noise


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        noise(64 + 16 * i, 300).rotate(i).save(folder / f"p{i}.png")
    return folder


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    for name in ("clip", "segmenter"):
        (folder / name).mkdir()
    return (
        tiny_judges.inception(folder),
        tiny_judges.clip(folder / "clip"),
        tiny_judges.segmenter(folder / "segmenter"),
    )


def command(photos, out, model, networks, *more):
    inception, clip, segmenter = networks
    judges = ("--inception", inception, "--clip", clip, "--segmenter", segmenter)
    return ("eval", "paper", photos, "--out", out, "--model", model, *judges, *more)


def refusal(capsys, *arguments):
    """The last line of a command that fails after it has loaded networks."""
    capsys.readouterr()
    assert run(*arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("percov2: ")
    return last


def values_in(out):
    return json.loads((out / "paper.json").read_text())["values"]


def test_every_measure_is_that_of_a_plain_statement(photos, random_model, networks, tmp_path):
    words = {f"p{i}": f"a photo of {'ab'[i % 2]}" for i in range(5)}
    (tmp_path / "words.json").write_text(json.dumps(words))
    out = tmp_path / "out"
    captions = ("--captions", tmp_path / "words.json")
    assert run(*command(photos, out, random_model, networks, *captions, "--seed", "3")) == 0
    codec = Codec.from_pretrained(random_model)
    originals = [to_rgb(read_image(path)) for path in sorted(photos.iterdir())]
    files = [codec.compress(original) for original in originals]
    restored = [np.asarray(codec.decompress(file, seed=3)) for file in files]
    found = values_in(out)
    assert found["bytes"] == np.mean([len(file) for file in files])
    pairs = list(zip(originals, restored, strict=True))
    expected = [measure(one, other)[0] for one, other in pairs]
    for name in ("psnr", "lpips_alex", "dists"):
        assert found[name] == pytest.approx(np.mean([one[name] for one in expected]))
    assert found["ms_ssim"] is None  # too small: the report says so
    network = clean_fid.InceptionFeatures(networks[0])
    sets = [network.features(some) for some in (originals, restored)]
    assert found["fid"] == pytest.approx(clean_fid.fid(*sets), rel=1e-5)
    assert found["kid"] == pytest.approx(clean_fid.kid(*sets), rel=1e-5)
    cut = [image[top : top + 256, :256] for image in originals for top in (0,)]
    assert all(part.shape[1] < 256 for part in cut) and found["fid_256"] is None
    counts = Segmenter(str(networks[2])).compare(originals, restored)
    assert found["miou"] == counts.mean_iou
    assert 0 <= found["clip_score"] <= 100 and -1 <= found["clip_likeness"] <= 1
    (point,), _ = measured_points([out / "paper.json"])
    assert point.bpp == found["bpp"] and point.values["clip_score"] == found["clip_score"]
    page = (out / "paper.md").read_text()
    for text in (
        "| FID |",
        "ms_ssim was not measured",
        "clean-fid 0.1.35",
        "mIoU (Long",
        "CLIP score of",
    ):
        assert text in page


def test_merged_shards_and_resumed_runs_equal_one_run(photos, random_model, networks, tmp_path):
    whole = tmp_path / "whole"
    assert run(*command(photos, whole, random_model, networks)) == 0
    first, second = tmp_path / "first", tmp_path / "second"
    run(*command(photos, first, random_model, networks, "--shard", "0/2"))
    assert not (first / "paper.json").exists() and len(list((first / "records").iterdir())) == 3
    run(*command(photos, second, random_model, networks, "--shard", "1/2"))
    (first / "records/p2.npz").unlink()  # as if killed
    times = {path: path.stat().st_mtime_ns for path in (first / "records").iterdir()}
    shard = ("--shard", "0/2", "--merge", second)
    assert run(*command(photos, first, random_model, networks, *shard)) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (first / "paper.json").read_bytes() == (whole / "paper.json").read_bytes()
    assert (first / "paper.md").read_bytes() == (whole / "paper.md").read_bytes()


def test_folders_of_other_runs_are_refused(photos, random_model, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    base = ("eval", "paper", photos, "--out", out, "--model", random_model)
    run(*base, "--shard", "0/2")
    again = (*base, "--protocol", "512")
    assert "holds another run: protocol was 'native' and is '512'" in failure(capsys, *again)
    settings = out / "settings.json"
    stored = settings.read_bytes()
    settings.write_text("[]")
    assert f"{settings} holds no settings of a run" in failure(capsys, *base)
    settings.unlink()
    assert f"holds records of unknown settings: {settings} is missing" in failure(capsys, *base)
    settings.write_bytes(stored)
    with np.load(out / "records/p0.npz") as arrays:
        np.savez(out / "records/p0.npz", bytes=arrays["bytes"])
    assert "p0.npz is no record of a photo" in refusal(capsys, *base)
    other.mkdir()
    assert "holds no run" in failure(capsys, *base, "--merge", other)
    base = ("eval", "paper", "--out", out, "--model", random_model)
    for words, message in [
        (("kodak", photos), "does not hold the 24 photos"),
        (("coco", photos), "coco needs --names"),
        (("imagenet", photos), "is not a folder, kodak DIR or coco DIR"),
        ((photos, "--shard", "2/2"), "shard 2 of 2 does not exist"),
        ((photos, "--shard", "x"), "no shard like 0/4"),
        ((photos, "--captions", photos), "name a model with --clip"),
        ((photos, "--labels", photos), "name a model with --segmenter"),
        ((photos, "--inception", tmp_path / "none.pt"), "which percov2 does not contain"),
    ]:
        assert message in failure(capsys, *base, *words)


CHANGES = {
    "captions": ("captions was ", "captions.json"),
    "labels": ("labels was ", "labels/a.png"),
    "photo": ("files was ", "photos/b.bmp"),
    "clip": ("definitions was 'CLIP score", "clip/model.safetensors"),
    "segmenter": ("definitions was 'mIoU", "segmenter/model.safetensors"),
    "draw seed": ("options differs in --draw-seed", ""),
    "caption": ("options differs in captioner text", ""),
}


@pytest.mark.parametrize("name", CHANGES)
def test_records_of_other_inputs_are_refused(name, random_model, networks, tmp_path, capsys):
    for folder in ("photos", "labels"):
        (tmp_path / folder).mkdir()
    for i, stem in enumerate("ab"):
        noise(64, 48, i).save(tmp_path / "photos" / f"{stem}.bmp")
        Image.new("L", (64, 48), i).save(tmp_path / "labels" / f"{stem}.png")
    (tmp_path / "captions.json").write_text(json.dumps({"a": "a red door", "b": "a wall"}))
    judges = []
    for judge in ("clip", "segmenter"):
        shutil.copytree(networks[1 if judge == "clip" else 2], tmp_path / judge)
        judges += [f"--{judge}", tmp_path / judge]
    base = ("eval", "paper", tmp_path / "photos", "--out", tmp_path / "out", "--shard", "0/2")
    base += ("--model", random_model, *judges, "--captions", tmp_path / "captions.json")
    base += ("--labels", tmp_path / "labels", "--stages", "3")
    assert run(*base, "--draw-seed", "1", "--caption", "a cat") == 0
    said, changed = CHANGES[name]
    if changed.endswith(".json"):
        (tmp_path / changed).write_text(json.dumps({"a": "a red door", "b": "a hat"}))
    elif changed.endswith(".safetensors"):
        tensors = load_file(tmp_path / changed)
        first = min(name for name, tensor in tensors.items() if tensor.is_floating_point())
        save_file({**tensors, first: tensors[first] + 1}, tmp_path / changed, {"format": "pt"})
    elif changed:
        size = (tmp_path / changed).stat().st_size
        with Image.open(tmp_path / changed) as image:
            image.point(lambda value: value ^ 1).save(tmp_path / changed)
        assert changed.endswith(".png") or (tmp_path / changed).stat().st_size == size
    seed, text = ("2" if name == "draw seed" else "1"), ("a dog" if name == "caption" else "a cat")
    again = refusal(capsys, *base, "--draw-seed", seed, "--caption", text)
    assert f"holds another run: {said}" in again


def test_equal_networks_in_another_folder_are_the_same(networks, tmp_path):
    for folder, judge in ((networks[1], Clip), (networks[2], Segmenter)):
        copy = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
        assert judge(str(copy)).describe() == judge(str(folder)).describe()


def test_what_is_missing_is_said_first(photos, random_model, networks, tmp_path, capsys):
    texts = tmp_path / "captions.json"
    texts.write_text(json.dumps({f"p{i}": "a wall" for i in range(3)}))
    base = command(photos, tmp_path / "out", random_model, networks)
    message = "2 of 5 photos have no caption, such as p3.png"
    assert message in refusal(capsys, *base, "--captions", texts)
    texts.write_text(json.dumps({f"p{i}": None for i in range(5)}))
    assert "the caption of p0 is no text" in refusal(capsys, *base, "--captions", texts)
    (tmp_path / "maps").mkdir()
    message = "5 of 5 photos have no label map, such as "
    assert message in refusal(capsys, *base, "--labels", tmp_path / "maps")
    assert not (tmp_path / "out").exists()
    plain = ("eval", "paper", photos, "--out", tmp_path / "out", "--model", random_model)
    said = output(capsys, *plain, "--shard", "0/2")
    assert "2 of 5 photos have none yet" in said


def test_protocols_squash_or_crop():
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200  # the central square
    assert prepared(pixels, "native") is pixels
    squashed, cropped = prepared(pixels, "512"), prepared(pixels, "512-crop")
    assert squashed.shape == cropped.shape == (512, 512, 3)
    assert (cropped == 200).all() and squashed[0, 0, 0] == 0 and squashed[0, 256, 0] == 200
    with pytest.raises(ValueError, match="unknown protocol '256'"):
        prepared(pixels, "256")


def test_label_maps_follow_the_protocol(tmp_path):
    labels = np.zeros((20, 60), np.uint8)
    labels[:, 20:40] = 3
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert (paper._labels_at(tmp_path / "a.png", "512-crop") == 3).all()
    squashed = paper._labels_at(tmp_path / "a.png", "512")
    assert squashed.shape == (512, 512) and (squashed == 3).mean() == pytest.approx(1 / 3, abs=0.01)
    counts = ConfusionCounts.of(squashed, squashed, 4)
    assert counts.mean_iou == 1


def test_photos_are_chosen_by_name(photos, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("p3.png\nsub/p1.png\n\n")
    assert [path.name for path in photo_list(photos, names)] == ["p1.png", "p3.png"]
    names.write_text("p3.png\nq.png\n")
    with pytest.raises(ValueError, match=r"1 of 2 photos .* such as q\.png"):
        photo_list(photos, names)
    names.write_text("p3.png\np1.png\n", encoding="utf-8-sig")
    assert [path.name for path in photo_list(photos, names)] == ["p1.png", "p3.png"]
    names.write_text("p3.png\n")
    with pytest.raises(ValueError, match=r"names\.txt names 1 photos"):
        photo_list(photos, names)
    names.write_bytes(b"caf\xe9.png\n")
    with pytest.raises(ValueError, match=r"names\.txt is no text in UTF-8"):
        photo_list(photos, names)
    noise(8, 8).save(photos / "p1.jpg")
    with pytest.raises(ValueError, match="two photos named p1"):
        photo_list(photos)
    with pytest.raises(ValueError, match="needs two"):
        photo_list(tmp_path)
    assert Shard.parse("1/3") == Shard(1, 3)


def test_captions_of_coco_are_the_first_of_each_photo(tmp_path):
    path = tmp_path / "captions.json"
    coco = {
        "images": [{"id": 7, "file_name": "0007.jpg"}],
        "annotations": [
            {"id": 5, "image_id": 7, "caption": "second"},
            {"id": 2, "image_id": 7, "caption": "first"},
        ],
    }
    path.write_text(json.dumps(coco))
    assert captions_in(path) == {"0007": "first"}
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds no captions"):
        captions_in(path)


def test_what_is_missing_says_what_to_fetch():
    texts = Judges().described()
    for part in (clean_fid.INCEPTION_URL, "--clip", "--segmenter", "EfficientNet-Lite0: not"):
        assert any(part in text for text in texts)
