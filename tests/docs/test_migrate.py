"""`examples/migrate`: scripts before and after their change to hvdloss."""

from __future__ import annotations

import difflib

import pytest

from tests.docs.pages import DOCS, ROOT, blocks, patched
from tests.ranks import Case, parallel_cases

MIGRATE = ROOT / "examples" / "migrate"
PAGES = {"horovod": "from-horovod", "ddp": "from-ddp", "keras": "from-keras"}


def changed(name: str) -> tuple[int, int]:
    """Return how many lines differ between a script and what became of it, and how many it has now."""
    before, after = (
        [line for line in (MIGRATE / f"{name}_{which}.py").read_text().splitlines() if line.strip()]
        for which in ("before", "after")
    )
    steps = difflib.SequenceMatcher(a=before, b=after, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in steps if kind != "equal"), len(after)


@pytest.mark.parametrize("name", PAGES)
def test_pages_count_what_changed(name):
    lines, of = changed(name)
    page = (DOCS / "howto" / f"{PAGES[name]}.md").read_text()
    assert f"**{lines} of {of} lines**" in page


@pytest.mark.parametrize("name", PAGES)
def test_pages_show_the_scripts(name):
    """A page's diff is the two files', and its program the one after."""
    page = (DOCS / "howto" / f"{PAGES[name]}.md").read_text()
    before, after = (
        (MIGRATE / f"{name}_{which}.py").read_text().splitlines() for which in ("before", "after")
    )
    shown = page.split("```diff\n")[1].split("```")[0].splitlines()
    for line in shown:
        if line.startswith("-"):
            assert line[1:] in {*before} - {*after}, line
        elif line.startswith("+"):
            assert line[1:] in {*after} - {*before}, line
        else:
            assert not line.strip() or line[1:] in after, line
    moves = list(difflib.unified_diff([a for a in before if a], [a for a in after if a], n=0, lineterm=""))[
        2:
    ]
    assert [s for s in shown if s.startswith(("+", "-"))] == [m for m in moves if not m.startswith("@@")]


def test_readme_shows_the_horovod_scripts():
    """Its diff makes one script the other; that of DDP is tried by a case of `torch_migrate`."""
    diff = next(text for kind, text in blocks("README.md") if kind == "diff")
    before, after = ((MIGRATE / f"horovod_{which}.py").read_text() for which in ("before", "after"))
    assert sorted(patched(before, diff).splitlines()) == sorted(after.splitlines())
    with pytest.raises(ValueError, match="not in the script: import horovod"):
        patched(after, diff)


@parallel_cases("torch_migrate", group="torch")
def test_before_is_wrong_and_after_exact(case: Case, request):
    case.check(request)


@parallel_cases("keras_migrate", group="tensorflow")
def test_before_is_wrong_and_after_exact_in_keras(case: Case, request):
    case.check(request)
