"""The documentation site: it builds strictly, needs no network, and misses no name."""

import importlib
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from _source import ROOT, lazy_packages

import varan
from _services import require
from varan.lab.catalogue import load

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason='mkdocs is not installed: pip install "varan[docs]"',
)
# What a browser fetches by itself when it shows a page.
_LOADED = {
    "script": "src",
    "link": "href",
    "img": "src",
    "source": "src",
    "iframe": "src",
    "video": "src",
    "audio": "src",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--site-dir",
            str(folder),
        ],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.links = [], set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.add(found.get("id"))
        if tag == "a":
            self.links.add(found.get("href", "").partition("#")[0])
        elif found.get(_LOADED.get(tag)):
            self.loads.append(found[_LOADED[tag]])


def _page(file):
    return _Page(file.read_text(encoding="utf-8"))


def test_nothing_is_loaded_from_another_host(site):
    foreign = re.compile(r"(?:https?:)?//")
    loaded = 0
    for file in site.rglob("*.html"):
        loads = _page(file).loads
        loaded += len(loads)
        wrong = [address for address in loads if foreign.match(address)]
        assert not wrong, f"{file.relative_to(site)} loads {wrong}"
    assert loaded > 100
    for file in site.rglob("*.css"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", text), file


def test_every_public_name_is_in_the_reference(site):
    shown = set()
    for file in (site / "reference").rglob("*.html"):
        shown |= _page(file).ids
    core = set(varan.__all__)
    for package in lazy_packages():
        for name in importlib.import_module(package).__all__:
            value = getattr(importlib.import_module(package), name)
            home = "varan" if package == "varan.core" and name in core else package
            if not inspect.ismodule(value):
                assert f"{home}.{name}" in shown, f"{home}.{name} is not documented"


def test_topics_rows_and_reference_link_to_each_other(site):
    # The report links to these addresses.
    catalogue = load()
    for topic in catalogue.topics:
        assert (site / "topics" / topic / "index.html").is_file()
    for row in catalogue.select(state="built"):
        page = _page(site / "rows" / row.id / "index.html")
        assert f"../../topics/{row.topic}/" in page.links
        assert any(link.startswith("../../reference/") for link in page.links)
        topic = _page(site / "topics" / row.topic / "index.html")
        assert f"../../rows/{row.id}/" in topic.links


def test_signatures_are_shown_as_they_are_called(site):
    text = re.sub(
        r"<[^>]*>", "", (site / "reference/varan.bilevel/index.html").read_text()
    )
    # Made by Equinox from the fields, and not with the space before a single name.
    assert re.search(r"\bAiPOD\(\s*stepsize: Float\[Array, (''|\"\")\]", text)
    assert re.search(r"multipliers: Float\[Array, ['\"]p['\"]\] \| None = None", text)
    # `Example:` and `Source: ...` are sections, not sentences.
    assert "Examples:" in text
    assert not re.search(r"\bSource: \w", text)


class _Silent(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(site):
    # Search runs in a worker, which a browser starts for no file:// page.
    handler = partial(_Silent, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_in_a_browser(address):
    program = require(shutil.which("chromium"), "Chromium")
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    wrong = []
    # The theme's menus repeat their landmarks.
    rules = {"rules": {"landmark-unique": {"enabled": False}}}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for path, scheme, width in (
            ("/", "light", 1280),
            ("/guide/lab/", "dark", 360),
            ("/rows/lv-hba/", "light", 360),
            ("/reference/varan.bilevel/", "dark", 1280),
        ):
            page = browser.new_page(
                viewport={"width": width, "height": 800}, color_scheme=scheme
            )
            page.on(
                "request", lambda r: r.url.startswith(address) or wrong.append(r.url)
            )
            page.on("requestfailed", lambda r: wrong.append(r.url))
            page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
            page.goto(address + path)
            for found in Axe().run(page, options=rules).response["violations"]:
                wrong.append((path, scheme, found["id"], found["nodes"][0]["html"]))
            if page.evaluate("document.documentElement.scrollWidth") > width:
                wrong.append(f"{path} is wider than {width}")
        page.keyboard.press("/")
        page.keyboard.type("hypergradient")
        page.locator(".md-search-result__link").first.wait_for()
        browser.close()
    assert not wrong, wrong
