"""The site builds strictly, asks for nothing from the network, and its reference has every public name."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import DOCS, ROOT

_found = importlib.util.spec_from_file_location("hooks", DOCS / "_site" / "hooks.py")
hooks = importlib.util.module_from_spec(_found)
_found.loader.exec_module(hooks)


def public(page: str) -> set[str]:
    """Return the names that a page of the reference must have, with their modules."""
    return {f"{module}.{name}" for module in hooks.PAGES[page][2] for name in hooks.names(module)}


def test_reference_has_every_public_module():
    """A package of the core with names of its own is on a page."""
    packages = {f"hvdloss.{p.parent.name}" for p in (ROOT / "hvdloss").glob("*/__init__.py")}
    private = {"hvdloss.cli", "hvdloss.watch"}  # commands; same_fate is everywhere
    assert packages - private <= {module for _, _, modules in hooks.PAGES.values() for module in modules}


@pytest.mark.parametrize("module", ["hvdloss", "hvdloss.losses", "hvdloss.terms", "hvdloss.data"])
def test_names_are_those_of_the_imported_module(module):
    imported = importlib.import_module(module)
    assert set(hooks.names(module)) == set(imported.__all__) - hooks.INTERNAL


def test_reference_names_what_is_horovods():
    text = (DOCS / "reference" / "index.md").read_text()
    ours = set(hooks.names("hvdloss.torch"))
    assert [n for n in hooks.names("hvdloss.torch._single") if n not in ours and f"`{n}`" not in text] == []


class _Asked(HTMLParser):
    """Collects what a browser loads for a page by itself, and the places that links may go to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        values = dict(given)
        self.ids.add(values.get("id") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.asked.append(values.get("href") or "")
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.asked += [values[k] or "" for k in ("src", "srcset", "data") if k in values]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason="pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_site_asks_for_nothing_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    for page in pages:
        parser = _Asked()
        parser.feed(page.read_text())
        assert not [a for a in parser.asked if a.startswith(("http", "//"))], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", sheet.read_text()), sheet
        assert "@import" not in sheet.read_text(), sheet


def test_site_has_every_public_name_and_no_private_one(site):
    for page in hooks.PAGES:
        parser = _Asked()
        parser.feed((site / "reference" / f"{page}.html").read_text())
        assert public(page) <= parser.ids
        private = [i for i in parser.ids if re.match(r"hvdloss\..*\._[a-z]", i)]
        assert private == []


def test_search_finds_pages(site):
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert any("Objective" in one["title"] for one in found)
    assert any(one["location"].startswith("howto/masked-tokens") for one in found)


@pytest.mark.more
def test_pages_open_in_a_browser_without_a_request(site, tmp_path):
    """A page from disk, in a browser that logs what it asks of the network."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here")
    log = tmp_path / "net.json"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
         "--disable-background-networking", "--disable-component-update", "--no-first-run",
         f"--log-net-log={log}",
         "--virtual-time-budget=3000", "--dump-dom", f"file://{site}/reference/torch.html"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "hvdloss.torch.Objective" in done.stdout
    asked = set(re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', log.read_text()))
    assert asked == set()
