"""What the source itself must not do: run what a file or another process says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("hvdloss", "adapters", "benchmarks", "examples")
# The torch.distributed engine's side of Horovod's own functions for objects, for programs that call them.
OBJECTS_FOR_PROGRAMS = ROOT / "adapters/torch/engines/objects.py"
FILES = sorted(
    path for folder in OURS for path in (ROOT / folder).rglob("*.py") if path != OBJECTS_FOR_PROGRAMS
)
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "marshal", "dill", "shelve", "joblib", "jsonpickle"}
#: Horovod's, which pickle on one rank and unpickle on others.
OBJECTS = {"broadcast_object", "allgather_object", "broadcast_object_fn", "gather_object"}


def dotted(node: ast.expr) -> str:
    """The name that an expression spells: ``np.load``."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def problems(source: str) -> list[str]:
    """Return what is wrong with a file, with line numbers."""
    out = []

    def wrong(node: ast.AST, what: str) -> None:
        out.append(f"line {node.lineno}: {what}")  # type: ignore[attr-defined]

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            for name in names:
                if name.split(".")[0] in MODULES:
                    wrong(node, f"imports {name}")
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "__import__"):
            wrong(node, f"calls {name}")
        if name == "torch.load":
            # A literal True, or an argument of the caller's own whose default is True (checked below).
            safe = keyword(node, "weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True) and dotted(safe or node) != (
                "weights_only"
            ):
                wrong(node, "torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and not is_false(keyword(node, "allow_pickle")):
            wrong(node, f"{name} without allow_pickle=False")
        if name in ("np.save", "numpy.save") and not is_false(keyword(node, "allow_pickle")):
            wrong(node, f"{name} without allow_pickle=False")
        if name.endswith("yaml.load") or name.endswith("yaml.unsafe_load") or name.endswith("yaml.full_load"):
            wrong(node, f"{name}; use yaml.safe_load")
        if name.split(".")[-1] in OBJECTS:
            wrong(node, f"{name} unpickles what another rank sent")
        if name.split(".")[-1] == "load_model" and isinstance(node.func, ast.Attribute):
            mode = keyword(node, "safe_mode")
            if is_false(mode):
                wrong(node, "load_model with safe_mode=False")
        if name in ("os.system", "os.popen") or (
            name.startswith("subprocess.")
            and isinstance(keyword(node, "shell"), ast.Constant)
            and keyword(node, "shell").value  # type: ignore[union-attr]
        ):
            wrong(node, f"{name} through a shell")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args]
            pairs = list(zip(reversed(arguments), reversed(node.args.defaults), strict=False))
            pairs += list(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
            for argument, default in pairs:
                if argument.arg == "weights_only" and not (
                    isinstance(default, ast.Constant) and default.value is True
                ):
                    wrong(node, "weights_only is not True by default")
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_data_says(path):
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f():\n    import marshal",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "def load(path, *, weights_only=False): torch.load(path, weights_only=weights_only)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "hvd.broadcast_object(x)",
        "hvd.allgather_object(x)",
        "keras.models.load_model(p, safe_mode=False)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_check_itself_finds_what_is_wrong(bad):
    assert problems(bad)


def test_all_of_the_source_is_looked_at():
    assert len(FILES) > 100
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(OURS)


def test_html_is_written_in_one_place_that_escapes():
    """By templates that escape; exempt are the style sheet and the drawings, no text of a record.

    That it escapes is tested in a browser, with a record that attacks it: tests/report/test_page.py.
    """
    template = (ROOT / "hvdloss" / "report" / "page.html.j2").read_text()
    assert "|safe" not in template.replace(" ", "")
    assert "autoescape" not in template  # nobody turns it off within
    allowed = {ROOT / "hvdloss" / "report" / "page.py", ROOT / "hvdloss" / "cli" / "report.py"}
    marked = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert "<html" not in node.value.lower(), path
                assert path in allowed or not node.value.lower().endswith(".html"), path
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "Environment":
                settings = {one.arg: one.value for one in node.keywords}
                assert getattr(settings.get("autoescape"), "value", None) is True, path
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "_markup":
                marked.append(ast.unparse(node))
    assert marked == ["_markup(style)", "_markup(chart.svg(layout))"]
