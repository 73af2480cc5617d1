"""The house: the core imports no framework, loads lazily, names what it offers, and its examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import hvdloss
from hvdloss import errors

ROOT = Path(hvdloss.__file__).parent
FOLDERS = (
    *(".", "_util", "check", "comm", "data", "explain", "losses", "metrics", "report", "report/trackers"),
    *("simulation", "split", "step", "terms", "terms/policies", "train"),
)
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
MODULES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
]
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "horovod", "mxnet"}
HEAVY = FRAMEWORKS | {"numpy", "click", "rich", "packaging", "matplotlib", "sklearn"}


def roots_loaded_by(code):
    """Return the top-level modules that `code` adds in a fresh interpreter."""
    program = (
        f"import json, sys; before = set(sys.modules)\n{code}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_importing_the_package_imports_nothing_heavy():
    loaded = roots_loaded_by("import hvdloss")
    assert "hvdloss" in loaded
    assert not loaded & HEAVY


def test_every_package_is_packaged():
    settings = (ROOT.parent / "pyproject.toml").read_text()
    for path in ROOT.rglob("__init__.py"):
        name = ".".join(path.parent.relative_to(ROOT.parent).parts)
        assert f'"{name}",' in settings, name


def test_using_the_whole_core_imports_no_framework():
    everything = "; ".join(f"import {name}" for name in MODULES)
    loaded = roots_loaded_by(f"{everything}; [getattr(hvdloss, name) for name in hvdloss.__all__]")
    assert "numpy" in loaded
    assert not loaded & (HEAVY - {"numpy"})


@pytest.mark.parametrize("name", hvdloss.__all__)
def test_every_public_name_resolves(name):
    assert getattr(hvdloss, name) is not None
    assert name in dir(hvdloss)


def test_names_are_listed_once_and_star_import_gives_them():
    assert len(set(hvdloss.__all__)) == len(hvdloss.__all__)
    space = {}
    exec("from hvdloss import *", space)
    assert set(hvdloss.__all__) <= set(space)


@pytest.mark.parametrize("name", ["nonsense", "torch_", "_HOMES_"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"'hvdloss' has no attribute '{name}'"):
        getattr(hvdloss, name)
    assert not hasattr(hvdloss, name)


@pytest.mark.parametrize("module", MODULES)
def test_what_a_module_declares_it_has(module):
    loaded = importlib.import_module(module)
    for name in getattr(loaded, "__all__", ()):
        assert hasattr(loaded, name), f"{module}.__all__ names {name}"


@pytest.mark.parametrize("name", errors.__all__)
def test_every_error_is_public_has_the_one_base_and_travels(name):
    kind = getattr(errors, name)
    assert getattr(hvdloss, name) is kind
    assert issubclass(kind, hvdloss.HvdlossError)
    assert issubclass(kind, RuntimeError)
    again = pickle.loads(pickle.dumps(kind("what")))
    assert type(again) is kind
    assert str(again) == "what"


def imports_of(path):
    """Return every module that a file imports, wherever in it."""
    return imports_in(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path)


def imports_in(nodes, path):
    """Return every module that nodes of a file import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            found.add(node.module)
            if node.module == "hvdloss":
                found.update(f"hvdloss.{alias.name}" for alias in node.names)
    return found


# Imported by the functions that need them, which say how to install what is missing.
EXTRAS = {"safetensors", "pyarrow", "shap", "lime", "matplotlib", "sklearn", "jinja2", "markupsafe"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_the_core_needs_numpy_and_the_standard_library_only(path):
    roots = {name.partition(".")[0] for name in imports_of(path)}
    assert not roots & FRAMEWORKS
    needed = set(sys.stdlib_module_names) | {"numpy", "hvdloss"}
    assert roots <= needed | EXTRAS
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outside = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    at_once = imports_in(outside, path)
    assert {name.partition(".")[0] for name in at_once} <= needed


def test_there_is_a_core_to_look_at():
    assert {"ledger", "reduction", "plan", "agreement", "communicator"} <= {path.stem for path in SOURCES}


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_there_are_examples_in_docstrings():
    assert sum(doctest.testmod(importlib.import_module(module)).attempted for module in MODULES) >= 2
