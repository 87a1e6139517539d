"""Data sets: rows, shards, tables and files through a codec, and runs that are killed."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from percov2 import Codec, DecodeOptions, EncodeOptions
from percov2.datasets import CompressImages, DecompressImages, PictureDecoder
from percov2.datasets.engines import run_ray
from percov2.datasets.shards import write_sample
from percov2.datasets.units import Unit
from percov2.places import Found
from tools.command_line import failure, run
from tools.full_disk import file_limit
from tools.photos import noise


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    out = io.BytesIO()
    noise(width + seed % 3, height).rotate(seed).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_shard(path: Path, keys: range, bad: int = -1) -> Path:
    mode = "w:gz" if path.suffix in (".gz", ".tgz") else "w"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for key in keys:
            members = {"jpg": jpeg(key), "txt": f"photo {key}".encode(), "cls": b"7"}
            if key == bad:
                members["jpg"] = members["jpg"][:90]
            for ending, data in members.items():
                entry = tarfile.TarInfo(f"{key:05}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of five samples; sample 7 is damaged."""
    write_shard(tmp_path / "in/a.tar", range(5))
    write_shard(tmp_path / "in/b.tar", range(5, 10), bad=7)
    write_shard(tmp_path / "in/sub/c.tar.gz", range(10, 15))
    return tmp_path / "in"


def test_rows_get_files_or_errors(random_model):
    codec = Codec.from_pretrained(random_model)
    pictures = np.empty(5, object)
    array = np.asarray(noise(20, 12))
    pictures[:] = [jpeg(1), {"bytes": jpeg(2), "path": None}, array, b"no picture", None]
    options = EncodeOptions(rate="coarse")
    compress = CompressImages(random_model, options=options, jobs=2)
    made = compress({"image": pictures, "label": np.arange(5)})
    expected = [codec.compress(one, options) for one in (jpeg(1), jpeg(2), array)]
    assert made["pcv2"][:3].tolist() == expected and made["pcv2"][3:].tolist() == [None, None]
    assert made["width"].tolist() == [41, 42, 20, 0, 0] and made["label"].tolist() == [*range(5)]
    assert made["error"][:3].tolist() == [""] * 3 and "image" not in made
    assert "not a picture" in made["error"][3] and "no picture" in made["error"][4]
    assert np.isnan(made["bpp"][3]) and made["bpp"][2] == 8 * len(expected[2]) / 240
    restore = DecompressImages(random_model, jobs=2)
    back = restore({"pcv2": made["pcv2"]})
    np.testing.assert_array_equal(back["image"][2], np.asarray(codec.decompress(expected[2])))
    assert [bool(error) for error in back["error"]] == [False] * 3 + [True] * 2
    with pytest.raises(ValueError, match="no column 'image'; there are img"):
        compress({"img": pictures})
    with pytest.raises(ValueError, match="a format of Pillow, not 'pngg'"):
        DecompressImages(random_model, form="pngg")


def test_rows_name_files_and_keep_them_if_asked(random_model, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    column = np.empty(2, object)
    column[:] = [{"bytes": None, "path": str(tmp_path / "a.jpg")}, {"bytes": None, "path": None}]
    made = CompressImages(random_model, keep=True)({"image": column})
    assert made["pcv2"][0] == Codec.from_pretrained(random_model).compress(jpeg(1))
    assert made["error"].tolist() == ["", "the row has no picture"]
    assert made["image"] is column
    options = DecodeOptions(seed=5)
    (back,) = DecompressImages(random_model, options=options, keep=True, form="PNG")(
        {"pcv2": made["pcv2"][:1]}
    )["image"]
    expected = Codec.from_pretrained(random_model).decompress(made["pcv2"][0], options)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(back))), np.asarray(expected))


def test_captions_of_rows_are_stored(random_model):
    codec = Codec.from_pretrained(random_model)
    batch = {"image": np.array([jpeg(1), jpeg(2)], object), "text": np.array(["a", None], object)}
    made = CompressImages(random_model, caption="text")(batch)
    decoded = codec.decode(list(made["pcv2"]))
    assert [one.caption for one in decoded] == ["a", ""]


def test_shards_become_shards_of_the_same_samples(shards, random_model, tmp_path, capsys):
    codec, model = Codec.from_pretrained(random_model), ("--model", random_model)
    out, engine = tmp_path / "out", ("--engine", "local")
    assert run("compress", "-r", shards, "-o", out, *engine, *model) == 1
    said = capsys.readouterr().err
    assert "b.tar: 00007: the picture is truncated or damaged" in said
    assert "14 pictures, " in said and "3 units" in said and "1 failed" in said
    made = {name: members(out / name) for name in ("a.tar", "b.tar", "sub/c.tar")}
    keys = sorted(name for shard in made.values() for name in shard)
    good = [key for key in range(15) if key != 7]
    assert keys == sorted(f"{key:05}.{end}" for key in good for end in ("cls", "pcv2", "txt"))
    for key in good:
        shard = made["a.tar" if key < 5 else "b.tar" if key < 10 else "sub/c.tar"]
        assert shard[f"{key:05}.pcv2"] == codec.compress(jpeg(key))
        assert shard[f"{key:05}.txt"] == f"photo {key}".encode()
    record = json.loads((out / "manifest/b.tar.json").read_text())
    assert (record["pictures"], record["faults"][0][0]) == (4, "00007")
    back = tmp_path / "back"
    assert run("decompress", "-r", out, "-o", back, *engine, *model) == 0
    restored = members(back / "sub/c.tar")
    with Image.open(io.BytesIO(restored["00012.png"])) as image:
        expected = codec.decompress(made["sub/c.tar"]["00012.pcv2"])
        np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_restore_pictures_in_spawned_workers(shards, random_model, tmp_path, workers):
    webdataset = pytest.importorskip("webdataset")
    torch = pytest.importorskip("torch")
    out = tmp_path / "out"
    run("compress", shards, "-o", out, "--engine", "local", "--model", random_model)
    options = DecodeOptions(seed=3)
    decode = PictureDecoder(random_model, options)
    samples = webdataset.WebDataset(str(out / "a.tar"), shardshuffle=False).decode(decode)
    context = "spawn" if workers else None
    loader = torch.utils.data.DataLoader(
        samples.to_tuple("pcv2", "txt"),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
    )
    codec, found = Codec.from_pretrained(random_model), list(loader)
    assert [text for _, text in found] == [f"photo {key}" for key in range(5)]
    for key, (picture, _) in enumerate(found):
        expected = codec.decompress(codec.compress(jpeg(key)), options)
        np.testing.assert_array_equal(np.asarray(picture), np.asarray(expected))


def test_finished_units_are_left_out_and_others_redone(shards, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    command = ("compress", "-r", shards, "-o", out, "--engine", "local", "--model", random_model)
    run(*command)
    first = {name: (out / name).read_bytes() for name in ("a.tar", "b.tar", "sub/c.tar")}
    times = {name: (out / name).stat().st_mtime_ns for name in first}
    record = json.loads((out / "manifest/a.tar.json").read_text())
    record["begun"] = True  # killed between the shard and its last record
    (out / "manifest/a.tar.json").write_text(json.dumps(record))
    (out / "sub/c.tar").unlink()
    capsys.readouterr()
    run(*command)
    assert "1 units finished before" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in first} == first
    changed = {name for name in first if (out / name).stat().st_mtime_ns != times[name]}
    assert changed == {"a.tar", "sub/c.tar"}
    message = failure(capsys, *command, "--rate", "coarse")
    assert "was made with options" in message and "use another folder" in message
    (out / "manifest/b.tar.json").write_text("{")
    assert "b.tar.json is damaged; delete it" in failure(capsys, *command)


def test_an_output_of_others_is_never_replaced(shards, random_model, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.tar").write_bytes(b"somebody's backup")
    command = ("compress", shards, "-o", out, "--engine", "local", "--model", random_model)
    assert "a.tar exists, and no run wrote it; use another folder" in failure(capsys, *command)
    assert (out / "a.tar").read_bytes() == b"somebody's backup"


def test_a_damaged_shard_fails_alone(shards, random_model, tmp_path, capsys):
    data = (shards / "a.tar").read_bytes()
    (shards / "a.tar").write_bytes(data[: len(data) // 2])
    (shards / "empty.tar").touch()
    out = tmp_path / "out"
    assert run("compress", shards, "-o", out, "--engine", "local", "--model", random_model) == 1
    said = capsys.readouterr().err
    assert "a.tar: not a shard, or damaged" in said and "empty.tar: not a shard" in said
    assert sorted(path.name for path in out.glob("*.tar")) == ["b.tar"]
    assert not list(out.rglob("*.part"))


def test_samples_of_any_kind_stay_in_their_shard(random_model, tmp_path, monkeypatch, capsys):
    """An ending in capitals, a sample without a picture, and one that is too large."""
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/A.TAR", "w") as tar:
        write_sample(tar, "a", {"JPG": jpeg(1), "seg.PNG": b"mask"})
        write_sample(tar, "b", {"txt": b"words alone"})
        write_sample(tar, "c", {"jpg": bytes(100_000), "txt": b"too large"})
    write_shard(tmp_path / "in/a.tar.gz", range(2))
    write_shard(tmp_path / "in/a.tgz", range(2))
    monkeypatch.setattr("percov2.datasets.shards.MOST_BYTES", 50_000)
    out = tmp_path / "out"
    command = ("compress", tmp_path / "in", "-o", out, "--engine", "local")
    assert run(*command, "--model", random_model) == 1
    said = capsys.readouterr().err
    assert "A.TAR: c: c.jpg has 100000 bytes" in said
    assert f"a.tgz: its output a.tar is also that of {tmp_path / 'in/a.tar.gz'}" in said
    expected = Codec.from_pretrained(random_model).compress(jpeg(1))
    assert members(out / "A.tar") == {
        "a.pcv2": expected,
        "a.seg.PNG": b"mask",
        "b.txt": b"words alone",
    }
    assert sorted(members(out / "a.tar")) == sorted(
        f"0000{key}.{end}" for key in range(2) for end in ("cls", "pcv2", "txt")
    )


def test_samples_lose_no_member_unsaid(random_model, tmp_path, capsys):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        write_sample(tar, "twice", {"png": jpeg(1)})
        write_sample(tar, "twice", {"png": jpeg(2), "txt": b"same key"})
        write_sample(tar, "words", {"txt": b"one"})
        write_sample(tar, "words", {"txt": b"two"})
        write_sample(tar, "taken", {"PCV2": b"older", "jpg": jpeg(3)})
        write_sample(tar, "both", {"png": jpeg(4), "jpg": jpeg(5)})
        write_sample(tar, "long", {"a.png": jpeg(6)})
        write_sample(tar, "kept", {"pcv2": b"no picture beside it"})
    small, back = tmp_path / "small", tmp_path / "back"
    more = ("--engine", "local", "--model", random_model)
    assert run("compress", tmp_path / "s.tar", "-o", small, *more) == 1
    said = capsys.readouterr().err
    assert "s.tar: twice: two members are named twice.png" in said
    assert "s.tar: words: two members are named words.txt" in said
    assert "s.tar: taken: its member PCV2 would be lost" in said
    assert "1 pictures, " in said and "2 samples without a picture copied, 3 failed" in said
    codec = Codec.from_pretrained(random_model)
    assert members(small / "s.tar") == {
        "both.pcv2": codec.compress(jpeg(4)),
        "both.jpg": jpeg(5),
        "long.a.png": jpeg(6),
        "kept.pcv2": b"no picture beside it",
    }
    record = json.loads((small / "manifest/s.tar.json").read_text())
    assert (record["pictures"], record["copied"], len(record["faults"])) == (1, 2, 3)
    with tarfile.open(small / "t.tar", "w") as tar:
        write_sample(tar, "a", {"pcv2": codec.compress(jpeg(1)), "png": b"older"})
        write_sample(tar, "b", {"txt": b"words"})
    assert run("decompress", small / "t.tar", "-o", back, *more) == 1
    said = capsys.readouterr().err
    assert "t.tar: a: its member png would be lost" in said
    assert "1 samples without a .pcv2 file copied, 1 failed" in said
    assert members(back / "t.tar") == {"b.txt": b"words"}


def test_outputs_that_cannot_be_written_are_named(shards, random_model, tmp_path, capsys):
    more = ("--engine", "local", "--model", random_model)
    loose, out = tmp_path / "loose", tmp_path / "out"
    for name in ("a.jpg", "b/b.jpg"):
        (loose / name).parent.mkdir(exist_ok=True, parents=True)
        (loose / name).write_bytes(jpeg(1))
    out.mkdir()
    (out / "b").touch()  # where a folder would have to be
    assert run("compress", "-r", loose, "-o", out, *more) == 1
    said = capsys.readouterr().err
    assert f"percov2: {loose / 'b/b.jpg'}: {out / 'b'}: " in said
    assert "1 pictures, " in said and "1 failed" in said
    write_shard(tmp_path / "big/a.tar", range(30))
    with file_limit(8000):
        assert run("compress", tmp_path / "big", "-o", out, *more) == 2
    source = tmp_path / "big/a.tar"
    said = capsys.readouterr().err
    assert f"percov2: {source}: {out / 'a.tar'}: File too large\n" in said
    assert "0 pictures, 0 bytes, " in said
    assert not list(out.rglob("*.tar")) and not list(out.rglob("*.part"))
    assert run("compress", tmp_path / "none.tar", "-o", out, *more) == 2
    none = f"percov2: {tmp_path / 'none.tar'}: No such file or directory\n"
    assert none in capsys.readouterr().err


def test_warnings_name_shard_and_sample(random_model, tmp_path, capsys):
    clear = io.BytesIO()
    Image.new("RGBA", (30, 30), (9, 9, 9, 100)).save(clear, "PNG")
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "s.tar", "w") as tar:
        write_sample(tar, "none", {"txt": b"words"})
        for key in "abc":
            write_sample(tar, key, {"png": clear.getvalue() if key != "b" else jpeg(1)})
    (folder / "loose.png").write_bytes(clear.getvalue())
    command = ("compress", folder, "-o", tmp_path / "out", "--engine", "local")
    assert run(*command, "--model", random_model) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "transparency" in line]
    about = "warning: transparency was flattened on white; it is not stored"
    names = [f"{folder / 's.tar'}: a", f"{folder / 's.tar'}: c", str(folder / "loose.png")]
    assert sorted(warned) == sorted(f"percov2: {name}: {about}" for name in names)


def test_tables_keep_their_other_columns(random_model, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    codec = Codec.from_pretrained(random_model)
    rows = [{"image": {"bytes": jpeg(i), "path": f"{i}.jpg"}, "label": i} for i in range(150)]
    rows[99]["image"]["bytes"] = b"no picture"
    clear = io.BytesIO()
    Image.new("RGBA", (30, 30), (9, 9, 9, 100)).save(clear, "PNG")
    rows[98]["image"]["bytes"] = clear.getvalue()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    out, more = tmp_path / "out", ("--engine", "local", "--model", random_model)
    assert run("compress", tmp_path / "t.parquet", "-o", out, *more) == 1
    said = capsys.readouterr().err
    assert "t.parquet: 99: not a picture" in said
    assert "t.parquet: 98: warning: transparency was flattened" in said
    made = parquet.read_table(out / "t.parquet").to_pylist()
    assert [row["label"] for row in made] == list(range(150))
    assert made[99]["pcv2"] is None and made[99]["error"]
    assert made[3]["pcv2"] == codec.compress(jpeg(3)) and made[3]["error"] == ""
    back = tmp_path / "back"
    assert run("decompress", out / "t.parquet", "-o", back, *more) == 1
    assert parquet.read_table(back / "t.parquet").to_pylist()[3]["image"].startswith(b"\x89PNG")
    command = ("compress", tmp_path / "t.parquet", "-o", tmp_path / "o2", "--column", "jpg", *more)
    assert run(*command) == 2
    assert "no column 'jpg'; there are image, label" in capsys.readouterr().err


def test_loose_files_are_mirrored_and_resumed(random_model, tmp_path, monkeypatch, capsys):
    for i in range(3):
        path = tmp_path / f"in/sub{i}/p.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(jpeg(i))
    monkeypatch.setattr("percov2.datasets.units._FILES_PER_UNIT", 2)
    out = tmp_path / "out"
    command = ("compress", "-r", tmp_path / "in", "-o", out, "--engine", "local")
    assert run(*command, "--model", random_model) == 0
    assert "2 units" in capsys.readouterr().err
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.pcv2")) == [
        f"sub{i}/p.pcv2" for i in range(3)
    ]
    (out / "sub1/p.pcv2").unlink()
    capsys.readouterr()
    assert run(*command, "--model", random_model) == 0
    assert "1 pictures, " in (said := capsys.readouterr().err) and "2 files skipped" in said
    (out / "sub2/p.pcv2").write_text("somebody's")
    assert run(*command, "--model", random_model) == 1
    said = capsys.readouterr().err
    assert f"{out / 'sub2/p.pcv2'}: it exists and is no .pcv2 file" in said
    assert "2 files skipped, 1 failed" in said
    assert (out / "sub2/p.pcv2").read_text() == "somebody's"


def test_an_engine_needs_a_folder_and_refuses_flags_of_single_files(shards, capsys):
    assert "--engine needs -o FOLDER" in failure(capsys, "compress", shards, "--engine", "local")
    command = ("compress", shards, "-o", "x", "--engine", "local", "--skip-existing")
    assert "--engine does not accept --skip-existing" in failure(capsys, *command)


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of this machine."""
    ray = pytest.importorskip("ray")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers would wait for other tests
    small = {"num_cpus": 2, "object_store_memory": 1 << 27, "include_dashboard": False}
    plugin = {"worker_process_setup_hook": "percov2.pillow.register"}
    try:
        ray.init(**small, runtime_env=plugin, log_to_driver=False)
    except Exception as error:  # some sandboxes allow no server
        pytest.skip(f"Ray does not start on this machine: {error}")
    yield ray
    ray.shutdown()
    monkeypatch.undo()


def test_ray_reads_pictures_with_the_plugin_of_pillow(cluster, tmp_path):
    import ray.data

    import percov2.pillow  # noqa: F401

    paths = [tmp_path / f"{i}.pcv2" for i in range(3)]
    for i, path in enumerate(paths):
        noise(40, 30 + i).save(path, rate="r002")
    rows = ray.data.read_images(
        str(tmp_path), file_extensions=["pcv2"], include_paths=True
    ).take_all()
    assert len(rows) == 3
    for row in rows:
        np.testing.assert_array_equal(row["image"], np.asarray(Image.open(row["path"])))


def test_ray_gives_the_same_shards(cluster, shards, tmp_path, capsys):
    local, out = tmp_path / "local", tmp_path / "ray"
    assert run("compress", "-r", shards, "-o", local, "--engine", "local") == 1
    assert run("compress", "-r", shards, "-o", out, "--engine", "ray") == 1
    for name in ("a.tar", "b.tar", "sub/c.tar"):
        assert (out / name).read_bytes() == (local / name).read_bytes()
    said = capsys.readouterr().err
    assert said.count("00007: the picture is truncated or damaged") == 2
    message = failure(
        capsys, "compress", "-r", shards, "-o", out, "--engine", "ray", "--rate", "r010"
    )
    assert "use another folder" in message


def test_a_unit_that_kills_its_workers_fails_alone(monkeypatch):
    """A pretended Ray, whose workers die on one unit and once on another."""
    died, killed = [], []

    class Died(Exception):
        pass

    class Worker:
        def __init__(self, settings):
            self.recode = SimpleNamespace(remote=Reference)

    class Reference:
        def __init__(self, unit):
            self.unit = unit

    def get(done):
        name = done.unit.sources[0].name
        if name == "poison" or (name == "b" and "b" not in died):
            died.append(name)
            raise Died
        return {"sources": [name], "faults": []}

    ray = ModuleType("ray")
    ray.__spec__ = ModuleSpec("ray", None)
    ray.is_initialized = lambda: True
    ray.cluster_resources = lambda: {"CPU": 2.0}
    ray.remote = lambda **_: lambda kind: SimpleNamespace(remote=Worker)
    ray.wait = lambda references: (references[:1], references[1:])
    ray.get, ray.kill = get, killed.append
    ray.exceptions = SimpleNamespace(RayActorError=Died)
    monkeypatch.setitem(sys.modules, "ray", ray)
    units = [Unit("shard", [Found(name, name)], name, name) for name in ("a", "poison", "b", "c")]
    records = {record["sources"][0]: record for record in run_ray(units, {})}
    assert "3 workers died on it" in records.pop("poison")["error"]
    assert sorted(records) == ["a", "b", "c"] and died.count("poison") == 3
    assert len(killed) == 2  # the workers that are left
    stopped = run_ray(units, {})
    next(stopped)
    stopped.close()
    assert len(killed) == 4


def test_ray_maps_rows(cluster):
    import ray.data

    data = ray.data.from_items([{"image": jpeg(i), "key": i} for i in range(8)])
    arguments = {"jobs": 1}
    made = data.map_batches(
        CompressImages, fn_constructor_kwargs=arguments, concurrency=1, batch_size=4
    ).take_all()
    codec = Codec.from_pretrained("tiny")
    found = {row["key"]: row["pcv2"] for row in made}
    assert found == {i: codec.compress(jpeg(i)) for i in range(8)}


def test_a_shard_is_never_its_own_output(shards, random_model, capsys):
    before = (shards / "a.tar").read_bytes()
    command = ("compress", shards, "-o", shards, "--engine", "local", "--model", random_model)
    assert run(*command) == 2
    assert "a.tar is an input; use another folder" in capsys.readouterr().err
    assert (shards / "a.tar").read_bytes() == before


def test_two_pictures_with_one_output_are_said(random_model, tmp_path, capsys):
    for name, seed in (("a.jpg", 1), ("a.png", 2)):
        (tmp_path / name).write_bytes(jpeg(seed))
    command = ("compress", tmp_path, "-o", tmp_path / "out", "--engine", "local")
    assert run(*command, "--model", random_model) == 1
    assert f"its output would be that of {tmp_path / 'a.jpg'}" in capsys.readouterr().err
    expected = Codec.from_pretrained(random_model).compress(jpeg(1))
    assert (tmp_path / "out/a.pcv2").read_bytes() == expected
