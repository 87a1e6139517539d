"""The contents of a built wheel and sdist: the source tree, the compiled module, nothing else.

``PERCOV2_DIST`` is the folder with the build (docs/how-to/release.md); without it these tests skip.
``FAIL_WITHOUT_DIST=1`` turns the skips into failures, for .ci/run.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

from percov2 import __version__

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("PERCOV2_DIST", ""))
FOUND = "PERCOV2_DIST" in os.environ
WHEELS = sorted(FOLDER.glob("percov2-*.whl")) if FOUND else []
SDISTS = sorted(FOLDER.glob("percov2-*.tar.gz")) if FOUND else []
DATA = f"percov2-{__version__}.data/data/"
"""Where a wheel stores what is installed into PREFIX/share."""
NATIVE = re.compile(r"percov2/_native\.cpython-(\d+)-[\w-]+\.so")
LARGEST = 40 << 20
"""Bytes; package indexes refuse files of more than 100 MB."""
# All that a module may need of the machine; not the CUDA driver, and no runtime of nvcc.
SYSTEM = {
    *("libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"),
    *("libpthread.so.0", "libdl.so.2", "librt.so.1"),  # parts of libc since glibc 2.34
}
LOADERS = {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


@pytest.fixture(params=WHEELS or [None], ids=lambda path: path.name if path else "none")
def wheel(request) -> zipfile.ZipFile:
    return zipfile.ZipFile(built(request.param))


@pytest.fixture(params=SDISTS or [None], ids=lambda path: path.name if path else "none")
def sdist(request) -> tarfile.TarFile:
    return tarfile.open(built(request.param))


def built(path: Path | None) -> Path:
    if path is not None:
        return path
    if FOUND:
        pytest.fail(f"PERCOV2_DIST={FOLDER} lacks a wheel or an sdist of percov2")
    if os.environ.get("FAIL_WITHOUT_DIST"):
        pytest.fail("FAIL_WITHOUT_DIST is set, but PERCOV2_DIST is not")
    pytest.skip("PERCOV2_DIST names no folder with built distributions")


def package_sources() -> dict[str, Path]:
    """Name in a wheel -> file of this tree."""
    found = {}
    for home, name in (("python/percov2", "percov2"), ("triton_kernels", "percov2/triton_kernels")):
        for path in (ROOT / home).rglob("*"):
            inside = path.relative_to(ROOT / home)
            if path.is_file() and inside.parts[0] != "triton_kernels":  # the link of developers
                found[f"{name}/{inside.as_posix()}"] = path
    shared = (path for path in (ROOT / "share").rglob("*") if path.is_file())
    found |= {f"{DATA}{path.relative_to(ROOT).as_posix()}": path for path in shared}
    ignored = re.compile(r"/__pycache__/|\.so$")
    return {name: path for name, path in found.items() if not ignored.search(name)}


def files(wheel: zipfile.ZipFile) -> list[str]:
    """Names of files; auditwheel stores folders as well."""
    return [info.filename for info in wheel.infolist() if not info.is_dir()]


def metadata(wheel: zipfile.ZipFile, name: str) -> Message:
    (path,) = (n for n in files(wheel) if n.endswith(f".dist-info/{name}"))
    return HeaderParser().parsestr(wheel.read(path).decode())


def native(wheel: zipfile.ZipFile) -> bytes:
    (name,) = filter(NATIVE.fullmatch, files(wheel))
    return wheel.read(name)


# Wheels ------------------------------------------------------------------------------------------


def test_wheel_is_small_and_holds_the_sources_and_one_compiled_module(wheel):
    names = [name for name in files(wheel) if ".dist-info/" not in name]
    sources = package_sources()
    assert len(names) == len(set(names))
    assert os.path.getsize(str(wheel.filename)) < LARGEST
    assert {name for name in names if not NATIVE.fullmatch(name)} == set(sources)
    assert sum(NATIVE.fullmatch(name) is not None for name in names) == 1
    for name, path in sources.items():
        assert wheel.read(name) == path.read_bytes(), name


def test_wheel_holds_what_the_package_needs_to_work_and_both_licences(wheel):
    # Spelt out, because the test above would not miss what is missing in the tree as well.
    needed = {
        "percov2/_native.pyi",
        "percov2/py.typed",
        "percov2/pretrained/tiny/config.json",
        "percov2/pretrained/tiny/README.md",
        "percov2/pretrained/tiny/flow/model.safetensors",
        "percov2/pretrained/tiny/r031/entropy/model.safetensors",
        "percov2/training/configs/tiny.toml",
        "percov2/triton_kernels/__init__.py",
        "percov2/triton_kernels/intervals.py",
        f"{DATA}share/bash-completion/completions/percov2",
        f"{DATA}share/fish/vendor_completions.d/percov2.fish",
        f"{DATA}share/file/magic/percov2",
        f"{DATA}share/man/man1/percov2.1",
        f"{DATA}share/mime/packages/percov2.xml",
        f"{DATA}share/zsh/site-functions/_percov2",
    }
    assert needed <= set(files(wheel))
    for name in ("LICENSE", "LICENSE-WEIGHTS.md"):
        (path,) = (n for n in files(wheel) if n.endswith(f".dist-info/licenses/{name}"))
        assert wheel.read(path) == (ROOT / name).read_bytes()
    assert metadata(wheel, "METADATA").get_all("License-File") == ["LICENSE", "LICENSE-WEIGHTS.md"]


def test_wheel_is_named_as_it_says_inside(wheel):
    said = metadata(wheel, "METADATA")
    name, version, *tags = Path(str(wheel.filename)).stem.split("-")
    assert said["Name"] == name == "percov2"
    assert said["Version"] == version
    assert version in (__version__, f"{__version__}+cu130")
    assert said["Requires-Python"] == ">=3.11"
    python, abi, platforms = tags
    expected = {f"{python}-{abi}-{platform}" for platform in platforms.split(".")}
    assert set(metadata(wheel, "WHEEL").get_all("Tag", [])) == expected
    (module,) = filter(None, map(NATIVE.fullmatch, files(wheel)))
    assert python == abi == f"cp{module[1]}"


def test_record_matches_every_file(wheel):
    (record,) = (n for n in files(wheel) if n.endswith(".dist-info/RECORD"))
    rows = list(csv.reader(io.StringIO(wheel.read(record).decode())))
    assert {row[0] for row in rows} == set(files(wheel))
    for name, digest, size in rows:
        if name == record:
            continue
        data = wheel.read(name)
        hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert (digest, int(size)) == (f"sha256={hashed}", len(data)), name


def test_module_needs_no_library_beyond_the_system(wheel, tmp_path):
    """A wheel with CUDA kernels must import where there is no driver; debug sections are trash."""
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    path = tmp_path / "module.so"
    path.write_bytes(native(wheel))
    command = ["readelf", "--wide", "--dynamic", "--section-headers", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", text))
    assert {"libc.so.6", "libstdc++.so.6"} <= needed <= SYSTEM | LOADERS
    assert "RPATH" not in text and "RUNPATH" not in text
    sections = set(re.findall(r"^ *\[ *\d+\] (\S+)", text, re.MULTILINE))
    assert ".text" in sections
    assert ".symtab" not in sections and not any(s.startswith(".debug") for s in sections)
    if "+cu" in Path(str(wheel.filename)).name:
        assert ".nv_fatbin" in sections


# The sdist ---------------------------------------------------------------------------------------


def test_sdist_holds_the_repository(sdist):
    members = sdist.getmembers()
    assert all(member.isfile() for member in members)
    top = f"percov2-{__version__}/"
    assert all(member.name.startswith(top) for member in members)
    stored = {member.name.removeprefix(top): member for member in members}
    del stored["PKG-INFO"]
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("needs the git repository")
    tracked = {name for name in listed.stdout.decode().split("\0") if name}
    assert set(stored) == {name for name in tracked if not name.startswith(".ci/")}
    for name, member in stored.items():
        data = sdist.extractfile(member)
        assert data is not None and data.read() == (ROOT / name).read_bytes(), name
