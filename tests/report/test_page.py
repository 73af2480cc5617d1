"""The page of a run in a real browser: it loads nothing, shows the record's numbers, and fits a phone."""

from __future__ import annotations

import html as escaping
import itertools
import json
import math
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from hvdloss.report import page, read
from hvdloss.report.charts import DARK, LIGHT, picture
from hvdloss.report.summary import summarize
from tests.report.browser import Browser, chromium
from tests.report.test_report import HOSTILE, make_record

needs_browser = pytest.mark.skipif(
    chromium() is None, reason="NOT RUN: there is no Chromium to open pages in (Debian: apt install chromium)"
)
VIEWS = [(1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


def written(folder: Path, name: str, paths: list[Path]) -> Path:
    out = folder / f"{name}.html"
    out.write_text(page.html([read(path) for path in paths]), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    return make_record(folder / "run.jsonl", ranks=4, steps=300)


@pytest.fixture(scope="module")
def one(folder: Path, run: Path) -> Path:
    return written(folder, "one", [run])


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Path:
    return written(folder, "hostile", [make_record(folder / "hostile.jsonl", ranks=3, steps=5, text=HOSTILE)])


@pytest.fixture(scope="module")
def several(folder: Path, run: Path) -> Path:
    others = [make_record(folder / f"r{n}.jsonl", ranks=2, steps=40, seed=n, name=f"run {n}") for n in (1, 2)]
    return written(folder, "several", [run, *others])


@pytest.fixture(scope="module")
def empty(folder: Path) -> Path:
    return written(folder, "empty", [make_record(folder / "empty.jsonl", ranks=2, steps=0, ended=False)])


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


# -- in a browser -----------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("which", ["one", "hostile", "several", "empty"])
def test_it_opens_without_an_error_loads_nothing_and_fits(browser, request, which):
    path = request.getfixturevalue(which)
    for width, scheme in VIEWS:
        browser.console.clear()
        browser.requests.clear()
        browser.open(path, width=width, scheme=scheme)
        browser.ask("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert browser.console == []
        assert browser.requests == [path.as_uri()]
        assert browser.ask("document.documentElement.scrollWidth") <= width
        assert browser.ask("document.scripts.length") == 0
        shown = browser.ask(
            "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 0)"
            ".map(s => s.viewBox.baseVal.width)"
        )
        assert len(shown) == browser.ask("document.querySelectorAll('figure').length")  # one of two layouts
        assert all(size == (328 if width == 360 else 860) for size in shown)


@needs_browser
def test_the_numbers_are_those_of_the_record(browser, one, run):
    browser.open(one)
    summary = summarize(read(run))
    facts = browser.ask(
        "Object.fromEntries([...document.querySelectorAll('.facts div')].map(d =>"
        " [d.querySelector('dt').textContent, +d.querySelector('data').value]))"
    )
    assert facts == {
        "last loss": summary.loss,
        "best loss": summary.best_loss,
        "samples": summary.samples,
        "time": summary.seconds,
        "ranks": summary.ranks,
        "held up by communication": summary.held_up,
        "averaging would be off by": summary.averaging_error,
        "decisions": summary.decisions,
        "faults": summary.faults,
    }
    told = browser.ask(
        "[...document.querySelectorAll('#lanes tbody tr')].map(row =>"
        " [...row.querySelectorAll('td')].map(cell => cell.querySelector('data')?.value ?? null))"
    )
    assert len(told) == 4
    for row, cells in zip(summary.rows, told, strict=True):
        numbers = (row.elements, row.elements_share, row.weight, row.weight_share, row.loss)
        times = (row.computing, row.waiting, row.moving, row.held_up, row.skew, row.nonfinite)
        assert [float(cell) for cell in cells] == [float(value) for value in (*numbers, *times)]
    record = read(run)
    counts = browser.ask(
        "[...document.querySelectorAll('#skew tbody tr')].map(row =>"
        " [...row.querySelectorAll('td data')].map(cell => +cell.value))"
    )
    assert counts == record.classes[-1]["counts"]
    rows = browser.ask(
        "[...document.querySelectorAll('#decisions tbody tr')].map(r => r.lastElementChild.textContent)"
    )
    assert rows == [decision["reason"] for decision in record.decisions]
    assert record.faults[0]["text"] in browser.ask("document.querySelector('#faults').textContent")


@needs_browser
def test_what_others_wrote_is_text(browser, hostile):
    browser.open(hostile)
    assert browser.ask("document.title") == f"{HOSTILE[:120]} · hvdloss report"
    assert browser.ask("document.querySelector('h1').textContent") == HOSTILE[:120]
    assert browser.ask("document.querySelectorAll('img, script, iframe, object, embed, form').length") == 0
    assert browser.ask(
        "[...document.querySelectorAll('*')].every(e => [...e.attributes].every(a => !/^on/.test(a.name)))"
    )
    texts = browser.ask("[...document.querySelectorAll('#skew svg text')].map(t => t.textContent)")
    assert any("<" in text for text in texts)  # a class's name, in the drawing


CONTRAST = """
(() => {
  const number = color => color.match(/[\\d.]+/g).map(Number)
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
  const ratio = (a, b) => {
    const [x, y] = [light(a), light(b)].sort((p, q) => q - p)
    return (x + 0.05) / (y + 0.05)
  }
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const color = number(getComputedStyle(e).backgroundColor)
      if (color.length < 4 || color[3] > 0) return color
    }
    return [255, 255, 255]
  }
  const out = []
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    const box = element.getBoundingClientRect()
    if (!own || !box.width || element.closest('title')) continue
    const style = getComputedStyle(element)
    const color = element.closest('svg') ? style.fill : style.color
    const found = ratio(number(color), behind(element.closest('svg')?.parentElement ?? element))
    if (found < 4.5) out.push([element.tagName, element.textContent.trim().slice(0, 40), color, found])
  }
  return out
})()
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_enough_contrast(browser, one, scheme):
    for width in (1200, 360):
        browser.open(one, width=width, scheme=scheme)
        browser.ask("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert browser.ask(CONTRAST) == []


@needs_browser
def test_the_check_of_contrast_finds_what_is_pale(browser, folder):
    (folder / "pale.html").write_text("<body style='background:#fff'><p style='color:#aaa'>pale</p>")
    browser.open(folder / "pale.html")
    assert [found[0] for found in browser.ask(CONTRAST)] == ["P"]


@needs_browser
def test_light_and_dark_follow_the_system_and_the_switch(browser, one):
    paper = "getComputedStyle(document.body).backgroundColor"
    rgb = {
        name: f"rgb({', '.join(str(int(palette['paper'][i : i + 2], 16)) for i in (1, 3, 5))})"
        for name, palette in (("light", LIGHT), ("dark", DARK))
    }
    browser.open(one, scheme="light")
    assert browser.ask(paper) == rgb["light"]
    browser.ask("document.getElementById('theme-dark').click()")
    assert browser.ask(paper) == rgb["dark"]
    browser.open(one, scheme="dark")
    assert browser.ask(paper) == rgb["dark"]
    browser.ask("document.getElementById('theme-light').click()")
    assert browser.ask(paper) == rgb["light"]


@needs_browser
def test_everything_has_a_name_for_those_who_cannot_see_it(browser, one):
    browser.open(one)
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    nodes = [node for node in nodes if not node.get("ignored")]

    def names(role):
        return [n.get("name", {}).get("value", "") for n in nodes if n.get("role", {}).get("value") == role]

    pictures = names("image") + names("img")
    assert len(pictures) >= 5
    assert all(len(name) > 20 for name in pictures)
    for role in ("region", "radio", "link", "table", "group"):
        assert all(name or role == "group" for name in names(role)), role
    assert names("radio") == ["System", "Light", "Dark"]
    ids = browser.ask("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    targets = browser.ask(
        "[...document.querySelectorAll('a[href]')].map(a => a.getAttribute('href').slice(1))"
    )
    assert set(targets) <= set(ids)
    levels = browser.ask("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


# -- without one --------------------------------------------------------------------------------------------


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(f * v for f, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_can_be_told_from_the_paper(palette):
    for name in ("text", "muted"):
        assert contrast(palette[name], palette["paper"]) >= 4.5, name
    assert contrast(palette["text"], palette["heat"]) >= 4.5  # the numbers in the heat map's fullest cells
    for name in set(palette) - {"grid", "paper", "heat"}:
        assert contrast(palette[name], palette["paper"]) >= 3, name


def test_the_policy_names_the_style_sheet_and_nothing_else(one):
    text = one.read_text(encoding="utf-8")
    assert text.count("<style>") == 1
    assert " style=" not in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    policy = escaping.unescape(text.partition('Content-Security-Policy" content="')[2].partition('"')[0])
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize("steps", [0, 1, 2, 300])
def test_a_picture_of_any_record(tmp_path, steps):
    from matplotlib import image

    path = make_record(tmp_path / "a.jsonl", ranks=2, steps=steps, text=HOSTILE)
    picture([read(path)], tmp_path / "a.png")
    assert image.imread(tmp_path / "a.png").std() > 0.01


def test_numbers_that_no_drawing_holds_are_left_out(tmp_path):
    path = make_record(tmp_path / "a.jsonl", ranks=2, steps=3)
    lines = []
    for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        if line["kind"] == "step":
            line |= {"loss": 1e307, "samples": 1e307, "objective_value": -1e307, "time": 1e300}
            line["ranks"] = {
                k: [1e307, None] if k not in ("nonfinite",) else v for k, v in line["ranks"].items()
            }
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = page.html([read(path)])
    assert "1e+307" in text
    assert math.isinf(summarize(read(path)).samples) is False
