"""What pyproject.toml, constraints.txt, the changelog and .ci say fits together."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from percov2 import __version__

ROOT = Path(__file__).resolve().parent.parent
HERE = "{}.{}".format(*sys.version_info)
RESOLVE = ROOT / ".ci" / "resolve"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
PINS = [
    line
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def requirements() -> list[Requirement]:
    """Return every requirement that is written out, those of extras included."""
    lists = [PROJECT["project"]["dependencies"], *EXTRAS.values()]
    return [Requirement(line) for lines in lists for line in lines]


def pythons() -> list[str]:
    return re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["project"]["classifiers"]))


def test_no_requirement_is_repeated() -> None:
    names = [canonicalize_name(one.name) for one in requirements()]
    assert [n for n in set(names) if names.count(n) > 1 and n != "percov2"] == []


def test_extras_build_on_extras_that_exist() -> None:
    for one in requirements():
        if one.name == "percov2":
            assert one.extras <= set(EXTRAS)
    assert {"gpu", "train", "eval", "docs", "test", "dev"} <= set(EXTRAS)


def test_every_direct_requirement_is_pinned_to_a_version_that_it_allows() -> None:
    pins = {canonicalize_name(pin.name): pin for pin in map(Requirement, PINS)}
    built = [*PROJECT["build-system"]["requires"], "build", "cibuildwheel", "uv"]
    tested = PROJECT["tool"]["cibuildwheel"]["test-requires"]
    for one in [*requirements(), *map(Requirement, [*built, *tested])]:
        if one.name != "percov2":
            version = str(pins[canonicalize_name(one.name)].specifier).removeprefix("==")
            assert version in one.specifier, f"{one} is pinned to {version}"


def test_pins_are_exact_sorted_and_given_once() -> None:
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in PINS)
    assert sorted(PINS, key=str.lower) == PINS
    assert len({canonicalize_name(pin.partition("==")[0]) for pin in PINS}) == len(PINS)


def test_torchvision_stays_out() -> None:
    names = {canonicalize_name(Requirement(one).name) for one in PINS}
    assert "torchvision" not in names | {one.name for one in requirements()}


def test_supported_pythons_are_the_same_everywhere() -> None:
    project, tools = PROJECT["project"], PROJECT["tool"]
    assert pythons() == ["3.11", "3.12", "3.13"]
    assert (
        project["requires-python"] == f">={pythons()[0]}" == f">={tools['mypy']['python_version']}"
    )
    assert tools["ruff"]["target-version"] == f"py{pythons()[0].replace('.', '')}"
    wheels = [f"cp{version.replace('.', '')}-*" for version in pythons()]
    assert tools["cibuildwheel"]["build"].split() == wheels
    hosted = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    assert f"python: {pythons()}".replace("'", '"') in hosted


def test_version_is_that_of_the_newest_entry_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest and newest[1] == __version__


# A stand-in for python3: `-m venv FOLDER` makes an environment of the scripts below.
PYTHON = """#!/bin/sh
mkdir -p "$3/bin" && cp "$STANDINS/pip" "$STANDINS/uv" "$3/bin" && ln -s "{python}" "$3/bin/python"
"""
UV = """#!/bin/sh
[ -z "$UV_INDEX_URL" ] || exit 3
case "$*" in *"$UNRESOLVED"*) echo "no version of triton fits" >&2; exit 1;; esac
printf 'torch==2.0\\nnumpy==1.0\\ntriton==3.0\\n'
"""


def resolve(
    tmp_path: Path, required: str, *, online: bool, unresolved: str = "nothing"
) -> list[str]:
    """Return what .ci/resolve prints, its exit status last, with stand-ins for pip and uv."""
    if not RESOLVE.exists():
        pytest.skip("an sdist has no .ci")
    scripts = {"python": PYTHON.format(python=sys.executable), "uv": UV}
    scripts["pip"] = f"#!/bin/sh\nexit {0 if online else 1}\n"
    for name, text in scripts.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PYTHON": str(tmp_path / "python"),
        "STANDINS": str(tmp_path),
        "UNRESOLVED": unresolved,
        "UV_INDEX_URL": "elsewhere",
        "PERCOV2_REQUIRE_INDEX": required,
    }
    done = subprocess.run(
        [RESOLVE], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    return [*done.stdout.splitlines(), str(done.returncode)]


def test_resolve_tries_every_extra(tmp_path: Path) -> None:
    *lines, status = resolve(tmp_path, "1", online=True)
    assert status == "0"
    assert lines == [
        f"Python {HERE}, percov2{name}: 3 packages, torch==2.0 triton==3.0"
        for name in ["", *(f"[{extra}]" for extra in EXTRAS)]
    ]


def test_resolve_fails_where_one_extra_does(tmp_path: Path) -> None:
    *lines, status = resolve(tmp_path, "", online=True, unresolved="--extra gpu")
    assert status == "1"
    failed = lines.index(f"Python {HERE}, percov2[gpu]: does not resolve")
    assert lines[failed + 1] == "  no version of triton fits"
    assert sum("does not resolve" in line for line in lines) == 1


@pytest.mark.parametrize(("required", "expected"), [("", "0"), ("1", "1")])
def test_resolve_without_the_index_fails_if_asked_to(
    tmp_path: Path, required: str, expected: str
) -> None:
    said, status = resolve(tmp_path, required, online=False)
    assert (said, status) == ("index not reachable: not checked", expected)
