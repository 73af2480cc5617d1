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

from tests.docs.pages import DOCS, ROOT

_found = importlib.util.spec_from_file_location("hooks", DOCS / "_site" / "hooks.py")
hooks = importlib.util.module_from_spec(_found)
_found.loader.exec_module(hooks)


def public(page: str) -> set[str]:
    """Return the names that a page of the reference must have, with their modules."""
    return {f"{module}.{name}" for module in hooks.PAGES[page][2] for name in hooks.names(module)}


def test_reference_has_every_public_module():
    """A package of the core with names of its own is on a page."""
    packages = {f"hvdloss.{p.parent.name}" for p in (ROOT / "hvdloss").glob("*/__init__.py")}
    inside = ("_util", "check", "cli", "comm", "simulation", "step", "watch")  # same_fate is everywhere
    private = {f"hvdloss.{name}" for name in inside}
    assert packages - private <= {module for _, _, modules in hooks.PAGES.values() for module in modules}


@pytest.mark.parametrize(
    "module", ["hvdloss", "hvdloss.losses", "hvdloss.terms", "hvdloss.data", "hvdloss.split"]
)
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
        parser.feed((site / "reference" / "api" / f"{page}.html").read_text())
        assert public(page) <= parser.ids
        private = [i for i in parser.ids if re.match(r"hvdloss\..*\._[a-z]", i)]
        assert private == []


def test_search_finds_pages(site):
    found = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    assert any("Objective" in one["title"] for one in found)
    assert any(one["location"].startswith("howto/masked-tokens") for one in found)


def opened(page: Path, folder: Path) -> tuple[str, set[str]]:
    """Open a page from disk in a browser; return what it shows, and what it asked of the network.

    The browser's own requests (for updates and the like) have no origin; a page's have.
    """
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here")
    log = folder / "net.json"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile",
         "--no-first-run", f"--log-net-log={log}", "--virtual-time-budget=3000", "--dump-dom", f"file://{page}"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    told = json.loads(log.read_text())
    kinds = {number: name for name, number in told["constants"]["logEventTypes"].items()}
    asked = {
        event["params"]["url"]
        for event in told["events"]
        if kinds[event["type"]] == "URL_REQUEST_START_JOB"
        and event.get("params", {}).get("initiator", "not an origin") != "not an origin"
    }
    return done.stdout, asked


@pytest.mark.more
def test_pages_open_in_a_browser_without_a_request(site, tmp_path):
    shown, asked = opened(site / "reference" / "api" / "torch.html", tmp_path)
    assert "hvdloss.torch.Objective" in shown
    assert asked == set()


@pytest.mark.more
def test_a_request_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<html><body>here<img src="http://127.0.0.1:9/a.png"></body></html>')
    shown, asked = opened(page, tmp_path)
    assert "here" in shown
    assert asked == {"http://127.0.0.1:9/a.png"}
