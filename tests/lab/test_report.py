"""The site as files: whole, safe, the same each time, and honest about verdicts."""

import errno
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from _report_sample import (
    CHECKS,
    GOOD,
    HOSTILE,
    built,
    catalogue,
    curve,
    fill,
    race,
    record,
)
from varan import cli
from varan.lab import verdict
from varan.lab.catalogue import Catalogue, load
from varan.lab.plots import by_plot
from varan.lab.report import SiteError, build
from varan.lab.report.chart import charts
from varan.lab.report.folder import MARKER, replacing
from varan.lab.report.gather import gather
from varan.lab.report.heats import heat
from varan.lab.report.numbers import duration, interval, number
from varan.lab.report.pages import Pages
from varan.lab.report.snippets import snippet, topic_text
from varan.lab.report.strip import strip
from varan.lab.store import Store

ASSETS = Path(verdict.__file__).parent / "report" / "assets"
VOID = {"meta", "link", "br", "img", "input", "wbr", "hr"}


class Page(HTMLParser):
    """What a page is made of: its elements, in order, and whether they close."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.unclosed = [], [], []
        self.words = []
        self.feed(text)
        self.close()
        self.unclosed += self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            self.unclosed.append(f"/{tag}")

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("store")) as opened:
        fill(opened)
        yield opened


@pytest.fixture(scope="module")
def site(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "site"
    build(catalogue(), store, folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {
        file.relative_to(site).as_posix(): Page(file.read_text(encoding="utf-8"))
        for file in sorted(site.rglob("*.html"))
    }


def results(rows, *entries, races=()):
    """The gathered results of a store that holds just these records."""

    class Fake:
        def newest_all(self):
            found = {}
            for entry in entries:
                if entry.outcome == "measured":
                    found.setdefault((entry.row, entry.scale), {})[entry.seed] = entry
            return found

        def records(self, *, outcome):
            return [entry for entry in entries if entry.outcome == outcome]

        def races(self):
            return list(races)

    return gather(Catalogue(tuple(rows)), Fake())


# --- Pages --------------------------------------------------------------------------


def test_there_is_a_page_for_everything(site, pages):
    assert {"index.html", "scoreboard.html", "verdicts.html"} <= set(pages)
    for row in catalogue().rows:
        assert f"rows/{row.id}.html" in pages
    for topic in ("games", "transport", "zeroth"):
        assert f"topics/{topic}.html" in pages
    assert len(pages) == 3 + 20 + 3


def test_every_page_is_well_formed_and_has_its_landmarks(pages):
    for name, page in pages.items():
        assert not page.unclosed, (name, page.unclosed)
        repeated = [ident for ident, n in Counter(page.ids).items() if n > 1]
        assert not repeated, (name, repeated)
        tags = Counter(tag for tag, _ in page.elements)
        assert tags["main"] == tags["h1"] == tags["footer"] == 1, name
        drawings = [a for a in page.all("svg") if a.get("class") == "chart"]
        assert tags["title"] == 1 + len(drawings), name
        assert page.all("html") == [{"lang": "en"}]
        assert ("a", {"class": "skip", "href": "#main"}) in page.elements
        for cell in page.all("th"):
            assert cell.get("scope") or "role" in cell, name
        assert tags["table"] == tags["caption"], name


def test_no_page_asks_for_anything_outside_or_runs_anything_inline(pages):
    for name, page in pages.items():
        policies = [m for m in page.all("meta") if "http-equiv" in m]
        assert "default-src 'none'" in policies[0]["content"]
        assert "unsafe" not in policies[0]["content"]
        for tag, attrs in page.elements:
            where = (name, tag, attrs)
            assert not any(key.startswith("on") for key in attrs), where
            assert "style" not in attrs and tag not in ("style", "img", "iframe"), where
            if tag == "script":
                assert set(attrs) <= {"src", "defer"} and attrs["src"], where
            if tag in ("script", "link"):
                target = attrs.get("src") or attrs.get("href")
                assert not re.match(r"[a-z]+:|//", target), where
            if tag == "a" and ":" in attrs["href"]:
                assert attrs["href"].startswith("https://arxiv.org/abs/"), where


def test_every_link_leads_somewhere(site, pages):
    for name, page in pages.items():
        for tag, attrs in page.elements:
            target = attrs.get("href") or attrs.get("src")
            if tag not in ("a", "link", "script") or target.startswith("https:"):
                continue
            file, _, anchor = target.partition("#")
            found = (
                (site / name).parent.joinpath(file).resolve() if file else site / name
            )
            assert found.is_file(), (name, target)
            if anchor and "=" not in anchor:
                known = pages[found.relative_to(site.resolve()).as_posix()].ids
                assert anchor in known, (name, target)


def test_hostile_text_is_shown_and_never_run(site, pages):
    page = pages["rows/hostile.html"]
    # The title, claim, author, data, note, label of a curve, ...: all as they came.
    assert page.text.count("<script>alert(1)</script>") >= 8
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        assert "<script>alert" not in text and "<img" not in text, file.name
    failed = pages["rows/broken.html"].text
    assert "Traceback: </title><script>" in failed
    assert HOSTILE in pages["rows/all-held.html"].text  # a remark of the race


def test_the_same_store_gives_the_same_bytes(store, site, tmp_path):
    build(catalogue(), store, tmp_path / "again")
    first = {f.relative_to(site): f.read_bytes() for f in site.rglob("*.*")}
    again = tmp_path / "again"
    second = {f.relative_to(again): f.read_bytes() for f in again.rglob("*.*")}
    assert first == second


def test_the_catalogue_itself_builds_without_a_store(tmp_path):
    found = build(load(), None, tmp_path / "site", docs="https://docs.example/x")
    assert found.counts["planned"] + found.counts["not run"] == 366
    row = Page((tmp_path / "site/rows/sinkhorn-newton-sparse.html").read_text("utf-8"))
    links = [a["href"] for a in row.all("a")]
    assert "https://docs.example/x/rows/sinkhorn-newton-sparse/" in links
    assert "Nothing has been measured yet." in row.text
    index = Page((tmp_path / "site/index.html").read_text("utf-8"))
    assert sum("data-topic" in attrs for attrs in index.all("tr")) == 366


# --- What a row's page says ---------------------------------------------------------


def test_a_row_page_has_all_that_was_measured(site, pages):
    text = pages["rows/all-held.html"].text
    for part in (
        "All 3 checks hold.",
        "laptop scale, 3 seeds, measured 2026-01-02 03:04",
        "Table 1 of the paper.",
        "at least 2",
        "from 0.9 to 1.1",
        interval(verdict.confidence_interval([5.0, 6.0, 7.0], "median")),
        "A note that every seed has.",
        "Only seed 1. (seed 1)",
        "The residual, proved.",
        "x = jnp.sqrt(jax.lax.stop_gradient(c))",
        "# 0.25",
        "a-peer 1.2",
        "2.1 (",  # and its interval
        "b-peer did not run: it is not installed.",
        "jax 0.9, numpy 2.1",
        "0123abcd",
        "20260102-030405-bcdfg",
        "A CPU, 2 cores, 8.0 GiB, Linux",
        "2 GiB",
        "700 ms",
        "changed since: varan run all-held --scale laptop",
    ):
        assert part in text, part
    told = json.loads((site / "data/all-held.json").read_text("utf-8"))
    assert told["outcome"] == "held"
    assert told["scales"]["laptop"]["checks"][0]["values"] == [5.0, 6.0, 7.0]
    assert told["races"][0]["skipped"] == {"b-peer": "it is not installed."}


def test_plots_are_drawn_described_and_their_numbers_reachable(site, pages):
    page = pages["rows/all-held.html"]
    figures = [a for a in page.all("svg") if a.get("class") == "chart"]
    assert len(figures) == 3  # two at laptop scale, one at smoke scale
    for attrs in figures:
        assert attrs["role"] == "img"
        assert set(attrs["aria-labelledby"].split()) <= set(page.ids)
    text = page.text
    assert "error (logarithmic) against steps. Median of 3 seeds" in text
    assert "ours: 1 at 1, 0.001 at 3." in text
    lines = (site / "data/all-held/laptop-1-convergence.csv").read_text().splitlines()
    assert lines[0] == "series,seed,x,y,smallest,largest"
    assert len(lines) == 1 + 2 * 3
    points = (site / "data/all-held/laptop-2-points.csv").read_text()
    assert "ours,0,2.0,inf,," in points


def test_what_is_no_number_is_a_word(pages):
    text = pages["rows/hostile.html"].text
    assert "infinite" in text and "not a number" in text
    before_the_program = text[: text.index("Use it varan.core")]
    assert not re.search(r"\b(nan|inf|None)\b", before_the_program)


def test_a_planned_row_says_what_is_missing_and_what_is_near(pages):
    text = pages["rows/planned-9.html"].text
    assert "claim has not been written down; nothing was measured" in text
    assert "Built in games" in text and "The paper of unclear" in text
    hrefs = [a["href"] for a in pages["rows/planned-15.html"].all("a")]
    assert "https://arxiv.org/abs/2402.00002" in hrefs


# --- Verdicts -----------------------------------------------------------------------


def test_verdicts_are_those_of_judge(store):
    for entry in gather(catalogue(), store).rows:
        for result in entry.scales:
            numbers = {seed: r.numbers for seed, r in result.records.items()}
            if result.outcome != "failed":
                judged = verdict.judge(entry.row, result.scale, numbers)
                assert result.verdict == judged


def test_outcomes_and_counts(store, pages):
    found = gather(catalogue(), store)
    assert {e.row.id: e.outcome for e in found.rows if e.row.state == "built"} == {
        "all-held": "held",
        "one-refuted": "not held",
        "unclear": "inconclusive",
        "broken": "failed",
        "smoke-only": "not run",
        "paper-only": "held",
        "never-run": "not run",
        "hostile": "held",
    }
    laptop, paper = found.counts("laptop"), found.counts("paper")
    assert (laptop["held"], laptop["not run"], paper["held"]) == (2, 3, 1)
    assert "1 of 2 seeds failed." in pages["rows/broken.html"].text
    assert "a smoke run decides nothing" in pages["rows/smoke-only.html"].text
    paper_only = pages["rows/paper-only.html"].text
    assert "paper scale, 3 seeds" in paper_only
    assert "The laptop scale has not been run." in paper_only
    board = pages["scoreboard.html"].text
    assert "Smoke runs never count" in board
    assert "Of 3 checks 1 is not held." in board


def test_few_seeds_and_missing_quantities_are_said():
    row = built(1, "a")
    (only,) = results([row], record("a", "laptop", 0)).rows
    assert "Measured with 1 of the 3 declared seeds." in only.headline.remarks
    numbers = {"gain": 1.0}
    (entry,) = results([row], record("a", "laptop", 0, numbers=numbers)).rows
    assert entry.outcome == "failed"
    assert "did not measure 'error'" in entry.headline.reason
    bad = record("a", "laptop", 0, numbers=GOOD | {"gain": float("nan")})
    assert "not a number" in results([row], bad).rows[0].headline.reason


LATER, EARLIER = "2026-01-03T00:00:00+00:00", "2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("seed", "fields", "outcome"),
    [
        (0, {"taken": LATER}, "failed"),
        (0, {"taken": EARLIER}, "held"),
        (5, {"taken": LATER}, "failed"),
        (5, {"taken": EARLIER, "fingerprint": "other"}, "held"),
        (5, {"taken": EARLIER, "fingerprint": None, "run": "r"}, "failed"),
        (5, {"taken": EARLIER, "fingerprint": None}, "held"),
    ],
    ids=["newer", "made good", "last", "other code", "same run", "long ago"],
)
def test_a_failure_counts_until_it_is_made_good(seed, fields, outcome):
    measured = [record("a", "laptop", n, run="r") for n in range(3)]
    failure = record("a", "laptop", seed, "failed", message="It broke.", **fields)
    (entry,) = results([built(1, "a")], failure, *measured).rows
    assert entry.outcome == outcome


def test_rows_that_the_catalogue_lacks_are_named():
    stray = record("gone", "laptop", 0)
    found = results([built(1, "a")], stray, races=[race()])
    assert found.unknown == ("all-held", "gone")


def test_current_code_gets_no_remark(monkeypatch):
    row = built(1, "a")
    known = record("a", "laptop", 0, fingerprint="now")
    monkeypatch.setattr("varan.lab.report.gather.present_fingerprint", lambda *_: "now")
    (entry,) = results([row], known).rows
    assert not any("changed since" in text for text in entry.headline.remarks)


# --- Drawings, numbers, snippets ----------------------------------------------------


@pytest.mark.parametrize(
    ("curves", "shown"),
    [
        ({0: [curve([1.0, 0.0, -1.0], log_x=True)]}, True),
        ({0: [curve(["inf", "nan", 1.0])], 1: [curve(["-inf", "nan", "inf"])]}, True),
        ({0: [curve(["nan", "nan"])]}, False),
        ({0: [curve([1.0, 2.0])], 1: [curve([1.0, 2.0, 3.0])]}, True),
        ({0: [curve([], label="empty")]}, False),
        ({0: [curve([1.0], f"{n}", marker=True) for n in range(12)]}, True),
        ({0: [curve([5.0, 5.0], log_y=False)]}, True),
        ({0: [curve([-1e308, 1e308], log_y=False)]}, True),
        ({0: [curve([1e-320, 1e300])]}, True),
        ({0: [curve([1e-300, 1.7e308])]}, True),
        ({0: [curve([5e-324])], 1: [curve([1.7e308])]}, True),
        ({0: [curve([1.7e308, 1.6e308])]}, True),
        ({0: [curve([1.0, 1.0 + 1e-15], log_y=False)]}, True),
        ({0: [curve([1.0]), curve([2.0])]}, True),
    ],
)
def test_odd_curves_are_drawn(curves, shown):
    (chart,) = charts(by_plot(curves))
    drawing = str(chart.svg("c"))
    assert not Page(drawing).unclosed
    assert ("No value that can be drawn" in drawing) != shown
    assert "nan" not in drawing.split("</desc>")[1]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seeds=st.lists(
        st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    ),
    log_x=st.booleans(),
    log_y=st.booleans(),
    marker=st.booleans(),
)
def test_any_floats_are_drawn_inside_the_drawing(seeds, log_x, log_y, marker):
    kinds = {"log_x": log_x, "log_y": log_y, "marker": marker}
    curves = {
        seed: [curve([y for _, y in points], x=[x for x, _ in points], **kinds)]
        for seed, points in enumerate(seeds)
    }
    (chart,) = charts(by_plot(curves))
    drawing = str(chart.svg("c")).split("</desc>")[1]
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", drawing):
        assert 0 <= float(x) <= 440 and 0 <= float(y) <= 270


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(allow_nan=False), min_size=1, max_size=5),
    st.sampled_from(CHECKS),
)
def test_any_floats_make_a_strip(values, check):
    told = verdict.judge_check(check, values, check.threshold)
    places = re.findall(r'(?:x|width|cx)="(-?[\d.]+)"', str(strip(told)))
    assert places and all(0 <= float(place) <= 168 for place in places)


def test_long_lines_are_thinned_without_losing_their_extremes():
    y = [1.0] * 50_000
    y[12_345] = 9.0
    (chart,) = charts(by_plot({0: [curve(y, log_y=False)]}))
    drawing = str(chart.svg("c"))
    assert len(drawing) < 40_000
    rows = [float(row) for row in re.findall(r"[ML][\d.]+ ([\d.]+)(?=L)", drawing)]
    assert min(rows) < 20 and max(rows) > 230


def test_a_strip_says_in_words_what_it_draws():
    check = verdict.judge_check(built(1, "a").checks[0], [4.0] * 3, 2.0)
    drawing = str(strip(check))
    assert "measured 4, interval" in drawing and "required at least 2: held" in drawing
    infinite = verdict.judge_check(built(1, "a").checks[0], [float("inf")] * 2, 2.0)
    assert "nan" not in str(strip(infinite)) and "inf " not in str(strip(infinite))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (-0.0719, "\u22120.0719"),
        (7571.4, "7571"),
        (23471.0, "23\u202f471"),
        (999_999.9, "1\u00a0\u00d7\u00a010⁶"),
        (6.7163e-14, "6.716\u00a0\u00d7\u00a010⁻¹⁴"),
        (1e-320, "1\u00a0\u00d7\u00a010⁻³²⁰"),
        (float("inf"), "infinite"),
        (float("-inf"), "minus infinite"),
        (float("nan"), "not a number"),
        (None, "not measured"),
    ],
)
def test_numbers_as_text(value, text):
    assert number(value) == text


def test_times_as_text():
    told = [duration(s) for s in (None, 2e-8, 0.35, 12.0, 200.0, 180.0, 7000.0)]
    assert told == [
        "not measured",
        "20 ns",
        "350 ms",
        "12 s",
        "3 min 20 s",
        "3 min",
        "1 h 56 min",
    ]
    assert duration(float("nan")) == "not a number"


def test_snippets_are_the_examples_of_the_docstrings():
    for row in load().select(state="built"):
        assert row.certificate
        for reference in row.method:
            found = snippet(reference)
            assert found.summary and found.code, reference
            compile(found.code, reference, "exec")
    missing = snippet("varan.nowhere:nothing")
    assert (missing.summary, missing.code) == ("", None)
    assert "plans" in topic_text("transport") and topic_text("zeroth") is None


def test_a_race_shows_what_failed_and_what_missed(tmp_path):
    told = race()
    told.contestants["a-peer"] |= {"wall_s": [0.2], "met": False, "error": 0.1}
    told.contestants["odd"] = {"wall_s": [], "cpu_s": [], "failed": "It broke."}
    found = {entry.name: strip for entry, strip in heat(told).contestants}
    assert found["ours"] is found["odd"] is None and "against 1" in found["a-peer"]
    told = results([built(1, "all-held")], races=[told])
    pages = dict(Pages(told).all())
    text = Page(pages["rows/all-held.html"]).text
    for part in ("2, timed once", "missed", "It broke."):
        assert part in text


# --- Colours ------------------------------------------------------------------------


def colours():
    """Name to its light and its dark colour, as the style sheet has them."""
    text = (ASSETS / "site.css").read_text("utf-8")
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\);", text)
    return {name: pair for name, *pair in found}


def contrast(one, other):
    """The contrast of two colours, as the guidelines for accessible content define."""

    def luminance(colour):
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in channels
        ]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


TEXT = ("ink", "muted", "accent", "held", "not-held", "inconclusive", "failed", "open")
GRAPHICS = ("edge", *(f"c{n}" for n in range(7)))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_is_enough(scheme):
    known = {name: pair[scheme] for name, pair in colours().items()}
    for ground in ("paper", "raised", "code"):
        for name in TEXT:
            assert contrast(known[name], known[ground]) >= 4.5, (name, ground)
    for name in GRAPHICS:
        assert contrast(known[name], known["paper"]) >= 3, name
    for name in ("ink", "held", "not-held", "inconclusive"):
        assert contrast(known[name], known["wanted"]) >= 3, name


# --- The folder ---------------------------------------------------------------------


def test_a_site_is_replaced_whole(tmp_path):
    folder = tmp_path / "site"
    for text in ("one", "two"):
        with replacing(folder) as site:
            site.write("index.html", text)
            if text == "one":
                site.write("old.html", text)
    assert sorted(f.name for f in folder.iterdir()) == ["index.html", MARKER]
    assert (folder / "index.html").read_text() == "two"
    assert [f.name for f in tmp_path.iterdir()] == ["site"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_the_last_site(tmp_path, error):
    folder = tmp_path / "site"
    with replacing(folder) as site:
        site.write("index.html", "one")
    with pytest.raises(error), replacing(folder) as site:
        site.write("index.html", "two")
        raise error
    assert (folder / "index.html").read_text() == "one"
    assert [f.name for f in tmp_path.iterdir()] == ["site"]


def test_nothing_foreign_is_deleted(tmp_path):
    def refused(folder):
        with pytest.raises(SiteError) as error, replacing(folder):
            pass
        return str(error.value)

    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused(file)
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    assert "is no site of varan" in refused(other)
    (other / MARKER).write_text("no JSON")
    (other / "thesis.tex").write_text("years of work")
    assert "did not write (thesis.tex)" in refused(other)
    site = tmp_path / "site"
    with replacing(site) as made:
        made.write("index.html", "one")
    (site / "results.sqlite").write_text("")
    assert "did not write (results.sqlite)" in refused(site)
    assert (site / "index.html").is_file() and (other / "thesis.tex").is_file()


# --- The command --------------------------------------------------------------------


def invoke(*arguments):
    words = ["report", *map(str, arguments)]
    return CliRunner().invoke(cli.app, words, prog_name="varan")


@pytest.fixture
def sampled(monkeypatch, tmp_path):
    """A results folder with the sample in its store, and the sample's catalogue."""
    monkeypatch.setattr("varan.lab.catalogue.load", catalogue)
    with Store(tmp_path / "results") as opened:
        fill(opened)
    return tmp_path / "results"


def test_the_command_writes_a_site(sampled, tmp_path):
    done = invoke("--out", sampled)
    assert done.exit_code == 0, done.output
    assert f"site  {sampled / 'site' / 'index.html'}" in done.stdout
    assert "26 pages: 3 held, 1 not held, 1 inconclusive, 1 failed" in done.stdout
    told = json.loads(
        invoke("--store", sampled, "--site", tmp_path / "s", "--json").stdout
    )
    assert told["start"] == str(tmp_path / "s" / "index.html")
    assert (told["pages"], told["verdicts"]["held"], told["left_out"]) == (26, 3, [])


def test_without_results_the_site_shows_the_catalogue(monkeypatch, tmp_path):
    monkeypatch.setattr("varan.lab.catalogue.load", catalogue)
    done = invoke("--out", tmp_path / "none", "--site", tmp_path / "site")
    assert done.exit_code == 0
    assert "nothing has been measured yet" in done.stderr
    assert not (tmp_path / "none").exists()
    done = invoke("--store", tmp_path / "none", "--site", tmp_path / "site")
    assert done.exit_code == cli.FAILED
    assert "There is no store at" in done.stderr


def test_a_folder_that_is_no_site_is_a_usage_error(sampled):
    done = invoke("--out", sampled, "--site", sampled)
    assert done.exit_code == cli.USAGE
    assert len(done.stderr.splitlines()) == 1 and "is no site of varan" in done.stderr
    assert (sampled / "results.sqlite").is_file()


def test_a_place_that_cannot_be_written_is_one_sentence(sampled, tmp_path):
    (tmp_path / "file").write_text("")
    done = invoke("--out", sampled, "--site", tmp_path / "file" / "site")
    assert done.exit_code == cli.FAILED
    assert "File exists" in done.stderr and "--site" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_full_disk_leaves_the_last_site(sampled, monkeypatch):
    invoke("--out", sampled)
    before = (sampled / "site" / "index.html").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("varan.lab.report.folder.Site.write", full)
    done = invoke("--out", sampled)
    assert done.exit_code == cli.FAILED
    assert "site: No space left on device." in done.stderr
    assert (sampled / "site" / "index.html").read_bytes() == before
    assert len(list(sampled.glob(".site*"))) == 0


def test_a_corrupt_store_is_one_sentence(sampled, tmp_path):
    (sampled / "results.sqlite").write_bytes(b"no database at all, " * 100)
    done = invoke("--out", sampled, "--site", tmp_path / "site")
    assert done.exit_code == cli.FAILED
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(("found", "code"), [(True, 0), (False, cli.FAILED)])
def test_open_opens_the_site(sampled, monkeypatch, found, code):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or found)
    done = invoke("--out", sampled, "--open")
    assert opened == [(sampled / "site" / "index.html").resolve().as_uri()]
    assert done.exit_code == code
    assert ("no browser was found" in done.stderr) != found
