"""Every code block of every page runs, and what pages say of its results is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from sybil.example import SybilFailure

from tests.docs.pages import COMMANDS, DOCS, OTHER, ROOT, RUN, blocks, every_page, ranks_of, run

# Blocks that do not run, with their reasons, by page. Let there be few.
SKIPPED = {
    "docs/reference/losses.md": [
        "needs four ranks, under which a test runs examples/torch_split_classifier.py"
    ],
}  # fmt: skip
# Pages whose blocks another test runs, in a process of their own; they may have `py` blocks that it does not.
ELSEWHERE = {
    "docs/tutorial.md": "docs/test_tutorial.py",  # as a notebook
    "docs/howto/integrations.md": "integrations/test_integration_guides.py",
    "docs/howto/launching.md": "integrations/test_integration_guides.py",
}
SLOW: set[str] = set()
PAGES = [page for page in every_page() if page not in ELSEWHERE and RUN & {kind for kind, _ in blocks(page)}]


# -- what a page says of its results --------------------------------------------------------------------


def losses(names: dict[str, Any], text: str) -> None:
    rows = dict(re.findall(r"^\| ([A-Z][^|]*?) \| (-?\d\.\d{3} \| -?\d\.\d{3}) \|$", text, re.M))
    assert rows == {name: f"{whole:.3f} | {mean:.3f}" for name, (whole, mean) in names["numbers"].items()}


def terms(names: dict[str, Any], text: str) -> None:
    assert names["optimizer"].last_step.step == 10
    assert names["shares"].sizes.tolist() == [64]
    assert names["objective"].terms[0].name == "padding"


def watch(names: dict[str, Any], text: str) -> None:
    assert names["optimizer"].last_step.step == 4


def data(names: dict[str, Any], text: str) -> None:
    assert names["rest"] == 1000 - 4 * 32
    assert sorted(i for shard in names["shards"] for i in shard.tolist()) == list(range(1000))


def explain(names: dict[str, Any], text: str) -> None:
    report, importance, shap = names["report"], names["importance"], names["shap"]
    assert report.elements == importance.rows == 569
    assert report.loss == pytest.approx(importance.baseline, rel=1e-12)
    assert report.hardest[0].share > 0.1
    assert importance.importances_mean.max() > 0.01
    assert names["together"].features == ["size", "texture"]
    predict = names["hvd"].predict_function(names["model"], output=names["probability"])
    assert abs(shap.values.sum(axis=1) + shap.base_values - predict(shap.data)).max() < 1e-6


def metrics(names: dict[str, Any], text: str) -> None:
    assert set(names["values"]) == {"accuracy", "f1", "auc", "loss"}
    assert 0 < names["estimate"].error < 0.01


def training(names: dict[str, Any], text: str) -> None:
    best, stopping = names["best"], names["stopping"]
    assert best.best == stopping.best
    assert best.steps == stopping.steps >= 4
    assert names["position"]["loader"]["epoch"] == 0


def elastic(names: dict[str, Any], text: str) -> None:
    state, before = names["state"], names["checkpoint"].load()
    assert state.step == 26  # what was left of three epochs of 13 steps
    assert before.step == 10
    assert before.values == {"note": "any values: numbers, strings, arrays"}


def report(names: dict[str, Any], text: str) -> None:
    assert (names["record"].status, len(names["record"].steps)) == ("finished", 10)
    again = names["hvdloss"].report.read("runs/by-class.jsonl")
    assert again.epochs[0]["metrics"]["recall"] == names["values"]["recall"].tolist()


THEN = {
    f"docs/{folder}/{check.__name__}.md": check
    for folder, checks in {
        "explanation": (watch,),
        "howto": (data, explain, metrics, training, elastic, report),
        "reference": (losses, terms),
    }.items()
    for check in checks
}


# -- the pages ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.more] * (p in SLOW)) for p in PAGES])
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    ran = run(page)
    assert ran.examples > 0
    assert ran.skipped == SKIPPED.get(page, [])
    if page in THEN:
        THEN[page](ran.names, (ROOT / page).read_text())


def test_no_page_is_left_out():
    shown = {page: [kind for kind, _ in blocks(page) if kind in RUN] for page in every_page()}
    assert {page for page, kinds in shown.items() if kinds} == {*PAGES, *ELSEWHERE}
    assert set(SKIPPED) | set(THEN) | SLOW <= set(PAGES)
    assert sum(map(len, SKIPPED.values())) <= 5
    for page, test in ELSEWHERE.items():
        assert Path(page).stem in (ROOT / "tests" / test).read_text()


@pytest.mark.parametrize("page", every_page())
def test_every_block_says_what_it_is(page):
    kinds = {kind for kind, _ in blocks(page)}
    kinds -= {"py"} if page in ELSEWHERE else set()
    assert kinds <= RUN | COMMANDS | OTHER, f"{page}: {kinds - RUN - COMMANDS - OTHER}; see pages.py"


@pytest.mark.parametrize("language", ["python", "pycon"])
def test_what_is_wrong_in_a_page_is_found(tmp_path, language, monkeypatch):
    from tests.docs import pages

    monkeypatch.setattr(pages, "ROOT", tmp_path)
    right, wrong = {"python": ("x = 1", "x = nothing"), "pycon": (">>> 1 + 1\n2", ">>> 1 + 1\n3")}[language]
    text = f"# Page\n\n```{language}\n{right}\n```\n\n- In a list:\n\n    ```{language}\n    CODE\n    ```\n"
    (tmp_path / "page.md").write_text(text.replace("CODE", right.replace("\n", "\n    ")))
    assert run("page.md").examples == 2
    (tmp_path / "page.md").write_text(text.replace("CODE", wrong.replace("\n", "\n    ")))
    with pytest.raises((NameError, SybilFailure)):
        run("page.md")


def test_pages_for_ranks_are_run_under_them():
    from tests.ranks import case_names

    cases = {
        page.replace("_", "-")
        for module in ("torch_pages", "keras_pages")
        for page in case_names(module)
    }  # fmt: skip
    assert cases == {Path(page).stem for page in every_page() if ranks_of(page) > 1}


# -- commands -------------------------------------------------------------------------------------------

# Programs that are not ours, whose options nobody looks at here.
SYSTEM = {
    "apt-get", "buildah", "cat", "cd", "curl", "docker", "echo", "eval", "exec", "export", "git",
    "helm", "jupyter", "kubectl", "mkdir", "mlflow", "mpirun", "open", "pip", "podman", "python",
    "quilt", "sbatch", "scp", "source", "srun", "ssh", "ssh-copy-id", "systemctl", "tar", "tensorboard",
    "torchrun", "umask", "wg", "xdg-open",
}  # fmt: skip
PLACEHOLDERS = {"train.py", "train_horovod.py"}  # the reader's own


def commands(page: str) -> list[list[str]]:
    """Return the words of each command that a page shows, without prompts, variables and comments."""
    found = []
    for kind, text in blocks(page):
        if kind not in COMMANDS or text.startswith("#!"):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if kind == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            for part in re.split(r"\s(?:&&|\|\||\||;)\s", re.sub(r"(^|\s)#.*$", "", line)):
                words = shlex.split(re.sub(r"\s\d?>{1,2}&?\s*\S+|\s<\s*\S+", "", part))
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
    return found


def check(words: list[str]) -> None:
    """Fail if a command cannot be what a page says."""
    program = Path(words[0]).name if words[0].startswith(".venv/bin/") else words[0]
    if program in ("sudo", "time"):
        return check(words[1:])
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(w in targets for w in words[1:] if "=" not in w and not w.startswith("-")), words
    elif program == "hvdloss":
        _check_ours(words)
    elif program == "horovodrun":
        from horovod.runner.launch import parse_args

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", words)
            launched = parse_args()
        check(launched.command if isinstance(launched.command, list) else shlex.split(launched.command))
    elif program == "python" and words[1:2] == ["-m"]:
        if words[2].startswith("hvdloss.benchmarks."):
            assert (ROOT / "benchmarks" / f"{words[2].split('.')[-1]}.py").exists(), words
    elif program == "python":
        scripts = [w for w in words[1:] if w.endswith(".py")]
        assert all(s in PLACEHOLDERS or (ROOT / s).exists() for s in scripts), words
    elif words[0].startswith(("./", "examples/", "tests/", "scripts/")):
        assert words[0] == "./hosts.sh" or (ROOT / words[0]).exists(), words
    else:
        assert program in SYSTEM, f"{program}: a command that test_pages.py does not know"
    return None


def _check_ours(words: list[str]) -> None:
    import click

    from hvdloss.cli import cli

    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        inner = command.get_command(click.Context(command), name)
        assert inner is not None, f"hvdloss {name}"
        command = inner
    options = {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help", "--version"}
    given = [w.split("=")[0] for w in rest[: rest.index("--") if "--" in rest else None] if w.startswith("-")]
    assert set(given) <= options, f"{shlex.join(words)}: {set(given) - options}"


@pytest.mark.parametrize("page", [p for p in every_page() if commands(p)])
def test_commands_are_what_there_is(page):
    for words in commands(page):
        check(words)


def test_a_wrong_command_is_found():
    for line in (
        "make nothing",
        "hvdloss nothing",
        "hvdloss doctor --nothing",
        "python examples/nothing.py",
        "nonesuch",
    ):
        with pytest.raises(AssertionError):
            check(shlex.split(line))


def test_inline_commands_name_what_there_is():
    """`make x` and `hvdloss x` within text."""
    for page in every_page():
        for line in re.findall(r"`((?:make|hvdloss) [^`]+)`", (ROOT / page).read_text()):
            if re.fullmatch(r"[\w\s./=-]+", line) and not re.search(r"\b[A-Z]{2,}", line):  # no placeholders
                check(line.split())


def test_pictures_exist():
    for page in DOCS.rglob("*.md"):
        for path in re.findall(r"!\[[^\]]*\]\(([^)#]+)", page.read_text()):
            assert (page.parent / path).exists(), f"{page}: {path}"


OUTSIDE = [str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("examples/**/*.md")]]


@pytest.mark.parametrize("file", sorted(OUTSIDE))
def test_links_outside_the_site_lead_somewhere(file):
    """Those between pages are mkdocs's to check (`make docs`)."""
    text = (ROOT / file).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path = link.partition("#")[0]
        if path and not re.match(r"[a-z]+:", link):
            assert ((ROOT / file).parent / path).exists(), link
