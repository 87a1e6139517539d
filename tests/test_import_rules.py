"""The import table of docs/explanation/architecture.md, read from the syntax tree of every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "percov2"
KERNELS = ROOT / "triton_kernels"

ENTROPY = """cdf int_transformer opening ranges rans sampling schedule staging streams tensor_file
token_coder transformer_config uniform visibility"""
CORE = "stored_files " + " ".join(f"entropy.{name}" for name in ENTROPY.split())
"""The entropy engine without torch."""
# Folder or module -> (first-party prefixes, third-party packages at module level, the same inside
# functions). The longest matching prefix counts; the standard library is always allowed.
MODELS = """batching caching extras models.backbone models.checksums models.config
models.stored_tensors models.windows models.tiny.backbone models.tiny.captions
models.tiny.graphs stored_files"""
"""The small model without torch, and what all models share."""
TORCH_FOLDERS = {
    "torch": "",
    "tiny.torch": "onnx onnxruntime",
    "sd3": "transformers",
    "perco": "transformers",
}
"""Folders of models on torch, and what they import inside functions besides."""
RULES: dict[str, tuple[str, str, str]] = {
    "percov2": ("extras", "", ""),
    "percov2._native": ("", "numpy", ""),
    "percov2.triton_kernels": ("triton_kernels", "torch triton", ""),
    "percov2.entropy": (CORE, "numpy", ""),
    "percov2.entropy.opening": (f"extras {CORE}", "", ""),
    "percov2.entropy.rans": ("_native entropy.cdf entropy.ranges", "numpy", ""),
    "percov2.entropy.schedule": ("", "numpy", ""),
    "percov2.entropy.torch": ("entropy", "numpy torch", ""),
    "percov2.batching": ("", "", ""),
    "percov2.caching": ("", "", ""),
    "percov2.container": (f"container batching caching {CORE}", "numpy", "transformers"),
    "percov2.container.bitstream": ("", "", ""),
    "percov2.extras": ("", "", ""),
    "percov2.machine": ("", "", ""),
    "percov2.stored_files": ("", "", ""),
    "percov2.models": (f"images {MODELS}", "numpy safetensors", "huggingface_hub torch"),
    "percov2.models.tiny": (f"_native images {MODELS}", "numpy onnxruntime tqdm", ""),
    **{
        f"percov2.models.{folder}": (
            "caching models extras stored_files",
            "diffusers numpy safetensors torch",
            more,
        )
        for folder, more in TORCH_FOLDERS.items()
    },
    "percov2.options": ("container.bitstream", "", ""),
    "percov2.colour_spaces": ("", "numpy", ""),
    "percov2.declared_colours": ("colour_spaces", "PIL", ""),
    "percov2.picture_structure": ("", "PIL", ""),
    "percov2.images": (
        "colour_spaces container.bitstream declared_colours picture_structure",
        "numpy PIL",
        "",
    ),
    "percov2.files": ("container.bitstream images stored_files", "numpy PIL", ""),
    "percov2.inputs": ("images", "numpy PIL", ""),
    "percov2.captioners": ("container.captions extras images", "PIL", "torch transformers"),
    "percov2.tokenizing": (f"batching container images {CORE} {MODELS}", "numpy", ""),
    "percov2.coarser_rates": ("container models.config", "", ""),
    "percov2.many_pictures": (
        f"batching container.bitstream inputs options {CORE} {MODELS}",
        "numpy PIL",
        "",
    ),
    "percov2.pillow": (
        "container.bitstream container.captions models.config options",
        "PIL",
        "",
    ),
    "percov2.places": ("extras", "", "fsspec"),
    "percov2.codec": (
        f"batching coarser_rates container images inputs many_pictures options tokenizing {CORE} "
        f"{MODELS}",
        "numpy PIL",
        "",
    ),
    "percov2.datasets": ("@codec datasets", "numpy PIL", "pyarrow ray"),
    "percov2.pipeline": ("@codec model_card", "diffusers huggingface_hub PIL torch", ""),
    "percov2.model_card": ("models.config stored_files", "huggingface_hub", ""),
    "percov2.datasets.shards": ("stored_files", "", ""),
    "percov2.photos": ("datasets.shards images stored_files", "numpy torch tqdm", ""),
    "percov2.evaluation": (
        "@codec evaluation machine photos",
        "numpy PIL torch tqdm",
        "efficientnet_lite_pytorch imageio_ffmpeg matplotlib pillow_heif pillow_jxl skimage "
        "torchmetrics transformers",
    ),
    "percov2.demo": ("@codec demo evaluation", "gradio numpy PIL", ""),
    "percov2.training": (
        "@codec datasets.shards training evaluation photos",
        "diffusers numpy PIL safetensors torch tqdm",
        "accelerate tensorboard tokenizers transformers webdataset",
    ),
    "percov2.bench": ("bench entropy machine", "numpy torch tqdm", "matplotlib"),
    "percov2.bench.codec": ("@codec bench", "numpy PIL", ""),
    # Also runs under the peers' interpreter, which has no percov2.
    "percov2.bench.timing": ("", "", ""),
    # Commands load the rest when they run.
    "percov2.cli": (
        "cli extras options places container.bitstream container.captions",
        "",
        "numpy",
    ),
    "percov2.cli.doctor": ("cli", "", "numpy torch"),
    "percov2.cli.many": ("cli batching models.backbone places", "tqdm", ""),
    "percov2.cli.datasets": ("cli options", "tqdm", ""),
    "percov2.__main__": ("cli", "", ""),
}
NATIVE = {"percov2.entropy.rans", "percov2.models.tiny"}
"""Rules of the modules that may import the compiled module."""
CODEC = """batching captioners coarser_rates codec colour_spaces container declared_colours
entropy extras files images inputs many_pictures models options picture_structure pipeline places
stored_files tokenizing"""
"""What ``@codec`` stands for: the codec and everything below it."""
# First-party prefixes that a folder may import inside functions.
LAZY: dict[str, str] = {
    "percov2.bench": "triton_kernels",
    "percov2.codec": "models.tiny.torch",
    "percov2.cli": "@codec bench datasets demo evaluation machine photos training",
    "percov2.pillow": "codec",
    "percov2.places": "files",
    "percov2.entropy": "entropy.torch",
    "percov2.entropy.torch": "triton_kernels",
    "percov2.models": "triton_kernels",
}


def prefixes(words: str) -> set[str]:
    """Dotted names of the prefixes in a table; everybody may import the version."""
    return {"percov2", *(f"percov2.{name}" for name in words.replace("@codec", CODEC).split())}


def module_name(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        parts = ["percov2", "triton_kernels", *path.relative_to(KERNELS).parts]
    else:
        parts = ["percov2", *path.relative_to(PACKAGE).parts]
    parts[-1] = parts[-1].partition(".")[0]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> list[Path]:
    kernels_link = PACKAGE / "triton_kernels"
    paths = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi"), *KERNELS.rglob("*.py")]
    return sorted(path for path in paths if not path.is_relative_to(kernels_link))


def within(name: str, prefixes: set[str]) -> bool:
    """True if name is one of the prefixes or below one; "percov2" itself covers only itself."""
    return any(
        name == prefix or (prefix != "percov2" and name.startswith(prefix + "."))
        for prefix in prefixes
    )


def best_rule(module: str, rules: dict) -> str | None:
    fitting = [p for p in rules if module == p or module.startswith(p + ".")]
    return max(fitting, key=len, default=None)


def is_type_checking(node: ast.AST) -> bool:
    tests = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.If) and ast.unparse(node.test) in tests


def imports(node: ast.AST, module: str, package: bool, lazy: bool = False) -> Iterator[tuple]:
    """(imported module, inside a function?) of everything that is imported at run time."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            for other in child.orelse:
                yield from imports(other, module, package, lazy)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, lazy
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parents = module.split(".")
                keep = len(parents) - child.level + (1 if package else 0)
                base = ".".join([*parents[:keep], *([base] if base else [])])
            for alias in child.names:
                name = f"{base}.{alias.name}"
                # "from percov2 import codec" imports a module, "from percov2.codec import Codec"
                # a name; only the former may reach further than its base says.
                yield (name if is_module(name) else base), lazy
        else:
            deeper = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, module, package, deeper)


def is_module(name: str) -> bool:
    if name == "percov2._native":
        return True
    if not name.startswith("percov2."):
        return False
    parts = name.split(".")[1:]
    base = KERNELS.parent if parts[0] == "triton_kernels" else PACKAGE
    path = base.joinpath(*parts)
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def violations(module: str, package: bool, text: str) -> list[str]:
    """Imports in a module's source that the rules forbid."""
    rule = best_rule(module, RULES)
    assert rule is not None, f"no import rule covers {module}; add one"
    if rule == "percov2" and module != "percov2":
        return [f"{module} has no import rule"]
    first, third, third_lazy = RULES[rule]
    lazy_rule = best_rule(module, LAZY)
    found = []
    for name, lazy in imports(ast.parse(text), module, package):
        root = name.partition(".")[0]
        if root == "percov2":
            allowed = within(name, prefixes(first))
            if lazy and lazy_rule:
                allowed = allowed or within(name, prefixes(LAZY[lazy_rule]))
            # A module may read its own package's version and the like only through its siblings.
            if name == "percov2._native" and rule not in NATIVE:
                allowed = False
        elif root in sys.stdlib_module_names:
            allowed = True
        else:
            allowed = root in third.split() or (lazy and root in third_lazy.split())
        if not allowed:
            found.append(f"{module} imports {name}{' (in a function)' if lazy else ''}")
    return found


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_module_follows_the_table(path):
    package = path.name == "__init__.py"
    assert violations(module_name(path), package, path.read_text(encoding="utf-8")) == []


def test_no_imports_run_in_a_circle():
    graph = {}
    for path in sources():
        module, tree = module_name(path), ast.parse(path.read_text(encoding="utf-8"))
        found = {name for name, _ in imports(tree, module, path.name == "__init__.py")}
        graph[module] = {name for name in found if is_module(name)}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("percov2.container.bitstream", "import numpy"),
        ("percov2.container.bitstream", "def f():\n    import torch"),
        ("percov2.container.bitstream", "from percov2 import codec"),
        ("percov2.models.torch.flow", "from percov2.entropy.rans import RansEncoder"),
        ("percov2.models.torch.flow", "from ...container.bitstream import Header"),
        ("percov2.entropy.cdf", "import torch"),
        ("percov2.entropy.cdf", "from percov2.entropy.torch import cdf"),
        ("percov2.entropy.cdf", "def f():\n    from percov2 import models"),
        ("percov2.entropy.cdf", "from percov2 import _native"),
        ("percov2.entropy.torch.cdf", "from percov2.triton_kernels import nearest_codes"),
        ("percov2.entropy.schedule", "from percov2.entropy import cdf"),
        ("percov2.codec", "from percov2 import training"),
        ("percov2.cli.main", "from percov2.codec import Codec"),
        ("percov2.bench.entropy", "from percov2.codec import Codec"),
        ("percov2.bench.timing", "from percov2.bench import cases"),
        ("percov2.helpers", "import os"),
    ],
)
def test_the_test_notices(module, text):
    assert len(violations(module, False, text)) == 1


def test_allowed_forms_pass():
    allowed = "def f():\n    from percov2.triton_kernels import nearest_codes\n"
    assert violations("percov2.entropy.torch.cdf", False, allowed) == []
    hints = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers\n"
    assert violations("percov2.entropy.cdf", False, hints) == []
    assert violations("percov2.entropy.token_coder", False, "from .rans import RansEncoder") == []


# What a header's name begins with -> the folders of csrc/ that may include it.
INCLUDERS = {
    **dict.fromkeys(("torch", "ATen", "c10", "Python.h"), ""),
    **dict.fromkeys(("pybind11", "python"), "python"),
    "coder": "coder cuda python transformer",
    "transformer": "python transformer",
    "cuda": "cuda python",
}


def test_compiled_core_knows_no_python_and_no_libtorch():
    for path in (path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        for root in re.findall(r'#\s*include\s*[<"]([^>"/]+)', text):
            allowed = INCLUDERS.get("cuda" if root.startswith("cuda_") else root)
            assert allowed is None or path.parent.name in allowed.split(), f"{path.name}: {root}"


def test_no_module_is_a_drawer_for_everything():
    for path in sources():
        assert not re.search(r"utils|helpers|common", path.stem), path


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import percov2", ["numpy", "torch", "PIL", "percov2._native", "percov2.codec"]),
        ("import percov2.container.bitstream", ["numpy", "torch", "PIL", "percov2._native"]),
        ("import percov2.cli.main", ["torch", "diffusers", "transformers", "percov2._native"]),
        ("import percov2.pillow", ["numpy", "torch", "onnxruntime", "percov2._native"]),
        ("import percov2.triton_kernels", ["torch", "triton"]),
        ("import percov2.container.tokens_file", ["torch", "PIL"]),
    ],
)
def test_importing_is_light(statement, absent):
    assert not modules_after(statement) & set(absent)


def test_the_entropy_library_loads_numpy_and_itself():
    loaded = modules_after("import percov2.entropy as e; [getattr(e, n) for n in e.__all__]")
    assert not loaded & {"percov2.models", "percov2.codec"}
    roots = {name.partition(".")[0] for name in loaded - modules_after("import numpy")}
    assert roots - sys.stdlib_module_names <= {"percov2", "numpy"}
