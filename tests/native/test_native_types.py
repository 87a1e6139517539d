"""The compiled module's types (_native.pyi) name what it has: no more, no less."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from percov2 import _native

STUB = Path(_native.__file__).with_name("_native.pyi")
if not STUB.exists():  # installed editable: the module lies elsewhere
    STUB = Path(__file__).resolve().parents[2] / "python" / "percov2" / "_native.pyi"

Signature = tuple[list[tuple[str, bool]], str]
"""Parameters without self, (name, has a default) each, and the type of the result."""
NOTHING: Signature = ([], "")
Signatures = dict[str, Signature]
"""Dotted name -> its signature."""


def stubbed(text: str) -> Signatures:
    """What the stub promises."""
    found: Signatures = {}

    def read(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name] = NOTHING
                read(node.body, f"{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                plain = [*node.args.posonlyargs, *node.args.args]
                optional = len(plain) - len(node.args.defaults)
                parameters = [(a.arg, i >= optional) for i, a in enumerate(plain)]
                assert not node.args.kwonlyargs and not node.args.vararg and not node.args.kwarg
                result = ast.unparse(node.returns) if node.returns else ""
                # The compiled module does not say what is in a tuple.
                result = "tuple" if result.startswith("tuple[") else result
                found[prefix + node.name] = (parameters[1 if prefix else 0 :], result)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found[prefix + node.target.id] = NOTHING

    read(ast.parse(text).body, "")
    return found


def signature(docstring: str) -> Signature:
    """What the first line of a pybind11 docstring says."""
    line = docstring.partition("\n")[0]
    match = re.fullmatch(r"\w+\((.*)\) -> (.*)", line)
    assert match, f"{line!r} is not a pybind11 signature; are there overloads? name them apart"
    parts, depth = [""], 0
    for character in match[1]:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    named = [part.partition(":")[0].strip() for part in parts]
    result = match[2].replace("numpy.typing.", "").replace("numpy.", "np.")
    result = result.replace("percov2._native.", "")
    return [
        (name, " = " in part)
        for name, part in zip(named, parts, strict=True)
        if name not in ("self", "")
    ], "tuple" if result.startswith("tuple[") else result.replace("np.bool]", "np.bool_]")


def compiled(module: object) -> Signatures:
    """What the compiled module has."""
    found: Signatures = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        found[name] = NOTHING if isinstance(value, type) else _called(value)
        if isinstance(value, type):
            for member, method in vars(value).items():
                if member == "__init__" or not member.startswith("_"):
                    found[f"{name}.{member}"] = _called(method)
    return found


def _called(value: object) -> Signature:
    docstring = getattr(value, "__doc__", None)
    return signature(docstring) if callable(value) and docstring else NOTHING


def test_a_docstring_is_read() -> None:
    line = "f(self: m.C, x: tuple[int, int] = (1, 2), y: int) -> numpy.typing.NDArray[numpy.int8]"
    assert signature(line) == ([("x", True), ("y", False)], "NDArray[np.int8]")
    with pytest.raises(AssertionError, match="overloads"):
        signature("f(*args, **kwargs)")


def test_stub_and_module_agree() -> None:
    assert stubbed(STUB.read_text(encoding="utf-8")) == compiled(_native)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def instruction_set() -> str: ...", ""),
        ("def instruction_set() -> str: ...", "def instruction_set(name: str) -> str: ..."),
        ("def use_instruction_set(name: str)", "def use_instruction_set(named: str)"),
        ("def use_instruction_set(name: str)", 'def use_instruction_set(name: str = "")'),
        ("def instruction_set() -> str: ...", "def instruction_set() -> int: ..."),
        ("def symbols_before_output(self)", "def symbols_after_output(self)"),
        ("class BatchDecoder:", "class Spare: ...\n\nclass BatchDecoder:"),
    ],
)
def test_the_test_notices(old: str, new: str) -> None:
    text = STUB.read_text(encoding="utf-8")
    assert old in text
    assert stubbed(text.replace(old, new)) != compiled(_native)
