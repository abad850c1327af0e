"""The page of a report in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pytest

from compressed_cache.eval.report.inputs import read
from compressed_cache.eval.report.page import page as make_page
from compressed_cache.eval.report.page import write
from compressed_cache.eval.results.row import append
from tests.reports import one_of_each
from tests.results import make_agreement

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH"),
    pytest.mark.slow,
]
playwright = pytest.importorskip("playwright.sync_api")

SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
Scheme = Literal["light", "dark"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    options = {"protect_prompt": True, "window": 32, "kernel_size": 5, "pool": "mean"}
    for policy in ("random", "streaming_llm+key_rerotation"):
        append(folder / "agreement.jsonl", make_agreement(policy=policy, options=options))
    paths = [*one_of_each(folder), str(folder / "agreement.jsonl")]
    write(make_page(read(paths)), folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as session:
        # A sandbox of its own needs rights that a container may lack.
        found = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Visit:
    """The page as it was opened, with whatever it complained about or asked for."""

    def __init__(
        self,
        browser: Browser,
        path: Path,
        screen: str = "desktop",
        scheme: Scheme = "light",
    ) -> None:
        width, height = SCREENS[screen]
        self.page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def column(self, title: str) -> list[str]:
        """The keys below a title of the first table, from top to bottom."""
        return self.page.evaluate(
            """title => {
              const table = document.querySelector("table");
              const titles = [...table.tHead.rows[0].cells];
              const column = titles.findIndex((cell) => cell.textContent === title);
              return [...table.tBodies[0].rows].map((row) => row.cells[column].dataset.key);
            }""",
            title,
        )

    def title(self, name: str) -> Locator:
        """The button that sorts the first table by a column."""
        return self.page.locator("table").first.get_by_role("button", name=name, exact=True)

    def order(self, name: str) -> str | None:
        """What a screen reader is told of a column."""
        return self.title(name).locator("xpath=..").get_attribute("aria-sort")


@pytest.fixture(scope="module")
def visit(browser: Browser, path: Path) -> Callable[..., Visit]:
    """A visit with one screen and scheme, the same for all tests that change nothing."""
    return cache(partial(Visit, browser, path))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("screen", SCREENS)
def test_nothing_is_asked_for_and_nothing_goes_wrong(
    visit: Callable[..., Visit], path: Path, screen: str, scheme: Scheme
) -> None:
    seen = visit(screen, scheme)
    files = [url for url in seen.requests if not url.startswith("data:")]
    assert files == [path.as_uri()]
    assert seen.complaints == []


def numbers(keys: list[str]) -> list[float]:
    return [float(key) for key in keys if key]


@pytest.mark.parametrize("title", ["budget", "to random, points"])
def test_a_click_on_a_title_sorts_by_numbers_with_what_is_missing_last(
    browser: Browser, path: Path, title: str
) -> None:
    visit = Visit(browser, path)
    before = visit.column(title)
    assert "" in before and before.index("") < len(before) - 1
    given = numbers(before)
    for expected, order in ((sorted(given), "ascending"), (sorted(given)[::-1], "descending")):
        visit.title(title).click()
        found = visit.column(title)
        assert numbers(found) == expected
        assert found[-before.count("") :] == [""] * before.count("")
        assert visit.order(title) == order
    visit.title("policy").click()
    assert visit.column("policy") == sorted(visit.column("policy"))
    assert (visit.order("policy"), visit.order(title)) == ("ascending", "none")


def test_rows_are_sorted_as_a_whole(browser: Browser, path: Path) -> None:
    visit = Visit(browser, path)
    names = ("policy", "budget", "accuracy %")
    before = list(zip(*map(visit.column, names), strict=True))
    visit.title("accuracy %").click()
    after = list(zip(*map(visit.column, names), strict=True))
    assert after != before and sorted(after) == sorted(before)


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts_too(browser: Browser, path: Path, key: str) -> None:
    visit = Visit(browser, path)
    visit.title("policy").focus()
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press(key)
    found = numbers(visit.column("budget"))
    assert found == sorted(found)
    assert visit.order("budget") == "ascending"


@pytest.mark.parametrize("screen", SCREENS)
def test_every_figure_is_seen_and_every_word_of_it_is_inside(
    visit: Callable[..., Visit], screen: str
) -> None:
    seen = visit(screen)
    figures = seen.page.locator("figure svg").all()
    assert len(figures) == seen.page.locator("figure").count() > 15
    for figure in figures:
        assert figure.is_visible()
    outside = seen.page.evaluate(
        """() => [...document.querySelectorAll("figure svg")].flatMap((svg) => {
          const box = svg.getBoundingClientRect();
          return [...svg.querySelectorAll("text")].filter((text) => {
            const own = text.getBoundingClientRect();
            return own.left < box.left - 1 || own.right > box.right + 1
              || own.top < box.top - 1 || own.bottom > box.bottom + 1;
          }).map((text) => `${svg.getAttribute("aria-label").slice(0, 60)}: ${text.textContent}`);
        })"""
    )
    assert outside == []


def test_on_a_phone_only_tables_are_wider_than_the_screen(visit: Callable[..., Visit]) -> None:
    seen = visit("phone")
    width = SCREENS["phone"][0]
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    wide = seen.page.evaluate(
        """() => [...document.querySelectorAll(".scroll, figure, p, dl, h1, h2, h3, nav")]
          .filter((each) => each.getBoundingClientRect().right > innerWidth)
          .map((each) => each.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert seen.page.evaluate(
        """() => [...document.querySelectorAll(".scroll")]
          .some((each) => each.scrollWidth > each.clientWidth)"""
    )


TABLES = """async () => {
  await new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)));
  return [...document.querySelectorAll(".scroll")].map((each) => ({
    name: each.getAttribute("aria-label"),
    columns: each.querySelectorAll("th").length,
    isCut: each.scrollWidth > each.clientWidth,
    sign: each.previousElementSibling.hidden ? "" : each.previousElementSibling.textContent,
  }));
}"""


def test_tables_are_whole_on_a_desktop_and_say_that_they_scroll_on_a_phone(
    visit: Callable[..., Visit],
) -> None:
    tables = visit("desktop").page.evaluate(TABLES)
    assert max(table["columns"] for table in tables) >= 18
    assert [table["name"] for table in tables if table["isCut"] or table["sign"]] == []
    tables = visit("phone").page.evaluate(TABLES)
    cut = [table for table in tables if table["isCut"]]
    assert len(cut) > 5
    for table in tables:
        sign = f"{table['columns']} columns, more of them to the right →"
        assert table["sign"] == (sign if table["isCut"] else "")


@pytest.mark.parametrize("screen", SCREENS)
def test_words_are_large_enough_to_read(visit: Callable[..., Visit], screen: str) -> None:
    sizes = visit(screen).page.evaluate(
        """() => {
          const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
          const sizes = {};
          while (walker.nextNode()) {
            const text = walker.currentNode;
            const parent = text.parentElement;
            if (!text.data.trim() || parent.closest("script, caption")) continue;
            const svg = parent.closest("svg");
            const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
            const size = parseFloat(getComputedStyle(parent).fontSize) * scale;
            sizes[size.toFixed(1)] = text.data.trim();
          }
          return sizes;
        }"""
    )
    assert len(sizes) > 2
    assert {size: text for size, text in sizes.items() if float(size) < 12} == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_stand_out_from_the_background(visit: Callable[..., Visit], scheme: Scheme) -> None:
    """By the contrast of WCAG: 4.5 for words, 3 for lines."""
    page = visit("desktop", scheme).page
    paper = _luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    colours = page.evaluate(
        """() => {
          const found = {words: new Set(), lines: new Set()};
          for (const each of document.querySelectorAll("h1, p, dt, dd, a, td, .mark, svg text")) {
            const style = getComputedStyle(each);
            found.words.add(each.closest("svg") ? style.fill : style.color);
          }
          for (const line of document.querySelectorAll("svg [id*=line2d] path")) {
            const group = line.closest("g[id*=axis]");
            if (!group) found.lines.add(getComputedStyle(line).stroke);
          }
          return {words: [...found.words], lines: [...found.lines].filter((c) => c !== "none")};
        }"""
    )
    assert len(colours["words"]) >= 3 and len(colours["lines"]) >= 6
    for kind, least in (("words", 4.5), ("lines", 3.0)):
        for colour in colours[kind]:
            light, dark = sorted((_luminance(colour), paper), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= least, (kind, colour)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
