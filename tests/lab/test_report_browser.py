"""The site in a real browser: search, filters, plots, schemes, keyboard, no network."""

import re
import shutil

import pytest

from _report_sample import catalogue, fill
from _services import require
from varan.lab.report import build
from varan.lab.store import Store

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
PAGES = (
    "index.html",
    "scoreboard.html",
    "verdicts.html",
    "topics/transport.html",
    "topics/zeroth.html",
    "rows/all-held.html",
    "rows/broken.html",
    "rows/hostile.html",
    "rows/planned-9.html",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    with Store(folder / "store") as store:
        fill(store)
        build(catalogue(), store, folder / "site")
    return (folder / "site").as_uri()


@pytest.fixture(scope="module")
def browser():
    program = require(shutil.which("chromium"), "Chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        # Without a sandbox it runs as root too; it only ever opens our own files.
        found = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser, site):
    """Opens a page of the site; whatever goes wrong on it fails the test at its end."""
    contexts, wrong = [], []

    def asked(request):
        if not request.url.startswith(("file://", "data:")):
            wrong.append(f"asked for {request.url}")

    def open_page(name, viewport=WIDE, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", asked)
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(f"{site}/{name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong, wrong


def shown(page):
    """The ids of the rows that the catalogue shows."""
    links = page.locator("#catalogue tr[data-topic]:visible th a")
    return [
        href.removeprefix("rows/").removesuffix(".html")
        for href in links.evaluate_all(
            "links => links.map(a => a.getAttribute('href'))"
        )
    ]


def choices(page, name):
    return page.locator(f"select[name={name}] option").all_text_contents()


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_without_a_complaint(visit, name):
    page = visit(name)
    assert page.locator("h1").count() == 1
    assert page.evaluate("getComputedStyle(document.body).maxWidth") == "1216px"


# --- Search and filters -------------------------------------------------------------


def test_search_finds_rows_by_title_id_claim_and_author(visit):
    page = visit("index.html")
    assert len(shown(page)) == 20
    assert page.locator("#shown").inner_text() == "All 20 rows"
    for words, found in {
        "plan, number 12": ["planned-12"],
        "SMOKE-only": ["smoke-only"],
        "method of unclear is faster": ["unclear"],
        "zoe unclear": ["unclear"],
        "no such thing": [],
    }.items():
        page.get_by_role("searchbox").fill(words)
        assert shown(page) == found
        assert page.locator("#shown").inner_text() == f"{len(found)} of 20 rows"
        assert page.locator("#nothing").is_visible() == (not found)


def test_filters_combine_and_count(visit):
    page = visit("index.html")
    page.get_by_role("combobox", name="Topic").select_option("games")
    assert len(shown(page)) == 9
    assert "planned (6)" in choices(page, "verdict")
    page.get_by_role("combobox", name="Verdict").select_option("built")
    assert shown(page) == ["unclear", "broken", "never-run"]
    assert choices(page, "topic") == [
        "all (8)",
        "games (3)",
        "transport (5)",
        "zeroth (0)",
    ]
    page.get_by_role("combobox", name="Source page").select_option("001")
    page.get_by_role("searchbox").fill("zoë")
    assert shown(page) == ["unclear", "broken"]
    assert page.locator("#topic-zeroth").is_hidden()
    page.get_by_role("button", name="Clear").click()
    says(page, "^A")
    assert len(shown(page)) == 20


def says(page, start):
    """Waits until the line of counts begins so."""
    from playwright.sync_api import expect

    expect(page.locator("#shown")).to_have_text(re.compile(start))


def test_a_view_can_be_shared(visit, site):
    page = visit("index.html")
    page.get_by_role("combobox", name="Verdict").select_option("not held")
    page.get_by_role("searchbox").fill("paper")
    address = page.evaluate("location.href")
    assert address.endswith("#q=paper&verdict=not+held")
    again = visit(address.removeprefix(f"{site}/"))
    assert shown(again) == ["one-refuted"]
    assert again.get_by_role("searchbox").input_value() == "paper"
    # What the address names and the page lacks is no filter.
    again.goto(f"{site}/index.html#verdict=nonsense&q=never")
    assert shown(again) == ["never-run"]
    again.goto(f"{site}/index.html#topic-zeroth")
    assert len(shown(again)) == 20


def test_the_numbers_above_choose_rows(visit):
    page = visit("index.html")
    page.get_by_role("link", name="1 inconclusive").click()
    says(page, "^1")
    assert shown(page) == ["unclear"]
    page.go_back()
    says(page, "^A")
    assert len(shown(page)) == 20


def test_from_a_search_to_the_row_and_its_plot(visit):
    page = visit("index.html")
    page.get_by_role("searchbox").fill("all-held")
    page.get_by_role("link", name="The paper of all-held").click()
    assert page.locator(".verdict .word").inner_text().strip() == "held"
    plot = page.get_by_role("img", name="convergence").first
    box = plot.bounding_box()
    assert box["width"] > 300 and box["height"] > 150
    lines = plot.locator("path.line")
    assert lines.count() == 2
    first, second = (
        lines.nth(n).evaluate("line => getComputedStyle(line).stroke") for n in (0, 1)
    )
    assert first != second != "none"
    page.locator("summary", has_text="Numbers of convergence").first.click()
    assert page.get_by_role("link", name="All points, as CSV").first.is_visible()
    assert page.get_by_role("cell", name="0.001").first.is_visible()


def test_hostile_text_runs_nothing(visit):
    page = visit("rows/hostile.html")
    assert "<script>alert(1)</script>" in page.locator("h1").inner_text()
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 1


# --- Schemes, sizes, keyboard, paper ------------------------------------------------


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_scheme_follows_the_system_and_the_reader(visit):
    light, dark = "rgb(251, 250, 246)", "rgb(20, 23, 27)"
    assert ground(visit("index.html", color_scheme="light")) == light
    page = visit("index.html", color_scheme="dark")
    assert ground(page) == dark
    page.get_by_role("button", name="Use light colours").click()
    assert ground(page) == light
    page.reload()
    assert ground(page) == light  # remembered
    page.get_by_role("button", name="Use dark colours").click()
    assert ground(page) == dark
    # What the system has anyway is not remembered.
    page.emulate_media(color_scheme="light")
    assert ground(page) == light


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_needs_no_sideways_scrolling(visit, name):
    page = visit(name, NARROW)
    for details in page.locator("details").all():
        details.evaluate("details => { details.open = true; }")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= NARROW["width"]


def test_checks_stay_a_table_where_they_are_cards(visit):
    page = visit("rows/all-held.html", NARROW)
    table = page.get_by_role("table", name="Checks").first
    assert table.get_by_role("row").count() == 1 + 2 * 3
    assert table.get_by_role("rowheader", name="gain").is_visible()


def test_the_keyboard_reaches_everything(visit):
    page = visit("index.html")

    def focused():
        page.keyboard.press("Tab")
        return page.evaluate(
            "[document.activeElement.textContent.trim() || document.activeElement.name,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )

    reached = [focused() for _ in range(20)]
    assert all(outline == "solid" for _, outline in reached)
    words = [text for text, _ in reached]
    assert words[:2] == ["Skip to the content", "varan"]
    assert "q" in words and "Clear" in words and "Use dark colours" in words
    assert words.index("Scoreboard") < words.index("q") < words.index("games")
    page.reload()
    page.keyboard.press("Tab")
    assert page.locator(".skip").bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.get_by_role("searchbox").focus()
    page.keyboard.type("unclear")
    page.keyboard.press("Enter")  # a search is no form that is sent
    assert shown(page) == ["unclear"]


def test_on_paper_there_are_no_controls(visit):
    page = visit("index.html", color_scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("#filters").is_hidden()
    assert page.locator("#scheme").is_hidden()
    assert ground(page) == "rgb(251, 250, 246)"
    assert page.locator("#catalogue").is_visible()


def test_without_javascript_everything_can_be_read(visit):
    page = visit("index.html", java_script_enabled=False)
    assert page.locator("#filters").is_hidden() and page.locator("#scheme").is_hidden()
    assert page.locator("#catalogue tr[data-topic]:visible").count() == 20
    page.locator("#topics a", has_text="zeroth").click()
    page.wait_for_url("**/index.html#topic-zeroth")
    page.get_by_role("link", name="1 inconclusive").click()
    page.wait_for_url("**/scoreboard.html#inconclusive")
    row = visit("rows/all-held.html", java_script_enabled=False)
    assert row.locator("svg.chart").first.is_visible()
    row.locator("summary", has_text="Every measured number").first.click()
    assert row.get_by_role("rowheader", name="other").is_visible()


# --- Accessibility ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "names"),
    [("light", PAGES), ("dark", ["index.html", "rows/all-held.html"])],
    ids=["light", "dark"],
)
def test_axe_finds_nothing(visit, scheme, names):
    from axe_playwright_python.sync_playwright import Axe

    axe, found = Axe(), []
    # It would fetch the style sheet once more, which the pages' policy forbids.
    options = {"resultTypes": ["violations"], "preload": False}
    for name in names:
        page = visit(name, color_scheme=scheme)
        for details in page.locator("details").all():
            details.evaluate("details => { details.open = true; }")
        for entry in axe.run(page, options=options).response["violations"]:
            nodes = "; ".join(node["html"][:120] for node in entry["nodes"][:3])
            found.append(f"{name}: {entry['id']}: {entry['help']} ({nodes})")
    assert not found, "\n".join(found)
