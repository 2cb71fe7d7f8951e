"""The built site: every link leads somewhere, nothing comes from a third party, and a browser has no complaint."""

import functools
import http.server
import json
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

from sources import ROOT

pytestmark = pytest.mark.site

SITE = Path(os.environ.get("EWC_SITE", ROOT / "_build/html"))
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
WRITTEN = [page for page in PAGES if page.startswith("book/")]
RESOURCES = ("script[src]", "link[href]", "img[src]", "iframe[src]", "source[src]", "video[src]", "audio[src]")


@functools.cache
def parsed(page: str) -> BeautifulSoup:
    return BeautifulSoup((SITE / page).read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(page: str) -> frozenset[str]:
    return frozenset(tag.get("id") or tag.get("name") for tag in parsed(page).select("[id], a[name]"))


def external(address: str) -> bool:
    return bool(urlsplit(address).netloc) or address.startswith("//")


def test_the_site_is_there():
    assert WRITTEN, f"no pages in {SITE}: build them first, with `make html`"
    assert not sorted(SITE.glob("reports/**/*.log")), "a notebook failed"


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_resolve(page):
    broken = []
    for tag in parsed(page).select("a[href], " + ", ".join(RESOURCES)):
        address = tag.get("href") or tag.get("src")
        parts = urlsplit(address)
        if parts.scheme in ("mailto", "data", "javascript") or external(address):
            continue
        target = ((SITE / page).parent / unquote(parts.path) if parts.path else SITE / page).resolve()
        found = target.is_relative_to(SITE.resolve()) and target.is_file()
        if found and parts.fragment and target.suffix == ".html":
            found = unquote(parts.fragment) in anchors(str(target.relative_to(SITE.resolve())))
        if not found:
            broken.append(address)
    assert not broken


@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_nothing_from_a_third_party(page):
    loads = ", ".join(RESOURCES)
    foreign = [str(tag) for tag in parsed(page).select(loads) if external(tag.get("src") or tag.get("href"))]
    canonical = [tag for tag in foreign if 'rel="canonical"' in tag]
    assert not [tag for tag in foreign if tag not in canonical]
    inline = " ".join(tag.get_text() for tag in parsed(page).select("script:not([src]), style"))
    assert not re.findall(r"""(?:fetch|import|url|src\s*=)\s*\(?\s*["']?(?:https?:)?//[^"')\s]+""", inline)


def test_style_sheets_load_nothing_from_a_third_party():
    foreign, missing = [], []
    for path in SITE.rglob("*.css"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        addresses = re.findall(r"""url\(\s*["']?([^"')]+)""", text) + re.findall(r"""@import\s+["']([^"']+)""", text)
        for address in addresses:
            if external(address):
                foreign.append((path.name, address))
            elif not address.startswith(("data:", "#")) and not (path.parent / urlsplit(address).path).is_file():
                missing.append((path.name, address))
    assert not foreign
    assert not missing


@pytest.mark.parametrize("page", WRITTEN)
def test_pictures_say_what_is_seen(page):
    for image in parsed(page).select("img"):
        alt, name = image.get("alt", "").strip(), Path(urlsplit(image["src"]).path).name
        assert len(alt) >= 15, f"{name}: {alt!r}"
        assert Path(alt).name != name


@pytest.mark.parametrize("page", PAGES)
def test_ids_are_unique(page):
    ids = [tag["id"] for tag in parsed(page).select("[id]") if tag.find_parent("svg") is None]
    assert not {name for name in ids if ids.count(name) > 1}


@pytest.mark.parametrize("page", WRITTEN)
def test_no_traceback_and_no_raw_mathematics(page):
    page = BeautifulSoup(str(parsed(page)), "html.parser")
    assert not page.select(".katex-error, .output.traceback, .output.stderr, .problematic, .system-message")
    for tag in page.select(".katex, pre, code, script, style"):
        tag.decompose()
    text = page.get_text()
    assert "Traceback (most recent call last)" not in text
    assert "$$" not in text
    assert not re.search(r"\\(begin|frac|mathbb|theta|sum|operatorname)\b", text)
    assert not re.search(r"\{(eq|ref|doc|numref|cite:?\w*|glue:\w+|prf:ref)\}", text)


def test_formulas_carry_text_for_screen_readers():
    notation = parsed("book/notation.html")
    assert len(notation.select(".katex")) == len(notation.select(".katex math")) > 0


def straight(text):
    """The page sets typographic quotes, the ledger keeps what the chapter wrote."""
    return text.translate(str.maketrans("’‘“”", "''\"\""))


def test_ledger_and_its_page_hold_the_same_checks():
    ledger = json.loads((SITE / "book/ledger.json").read_text(encoding="utf-8"))
    assert set(ledger) == {"build", "entries"}
    build = ledger["build"]
    assert {"scale", "data_source", "device", "hardware", "versions", "seconds_per_chapter"} <= set(build)
    assert build["scale"] in ("smoke", "laptop", "paper")
    assert build["data_source"] in ("full", "sample")
    for entry in ledger["entries"]:
        assert set(entry) == {"chapter", "kind", "name", "ok", "values"}
        assert entry["kind"] in ("identity", "claim")
        assert entry["ok"] is True
        assert entry["values"]
        assert isinstance(build["seconds_per_chapter"][entry["chapter"]], float)
    page, shown = parsed("book/ledger.html"), []
    for section in page.select("section[id^=checks-of-]"):
        rows = [row.select("td") for row in section.select("tbody tr")]
        shown += [
            (section["id"].removeprefix("checks-of-"), row[0].get_text(strip=True), row[1].get_text(strip=True))
            for row in rows
        ]
    listed = [(entry["chapter"], entry["kind"], entry["name"]) for entry in ledger["entries"]]
    assert [(chapter, kind, straight(name)) for chapter, kind, name in shown] == listed


def test_check_lines_of_the_pages_are_the_ledger():
    entries = json.loads((SITE / "book/ledger.json").read_text(encoding="utf-8"))["entries"]
    for page in WRITTEN:
        listed = [entry["name"] for entry in entries if f"book/{entry['chapter']}.html" == page]
        lines = [line.select("span:not(.tick)")[0].get_text() for line in parsed(page).select("p.ewc-check")]
        assert [straight(line.split(": ", 1)[1]) for line in lines] == listed


def test_banner_says_when_the_sample_was_used():
    build = json.loads((SITE / "book/ledger.json").read_text(encoding="utf-8"))["build"]
    for page in PAGES:
        if parsed(page).select_one("article"):
            banner = parsed(page).select_one(".bd-header-announcement")
            assert (banner is not None) == (build["data_source"] == "sample"), page


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server that does not log."""

    def log_message(self, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def server():
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/"
        running.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on PATH: the browser tests did not run")
    with playwright.sync_playwright() as running:
        try:
            chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        yield chromium
        chromium.close()


CUT = """() => {
    document.querySelectorAll(".toggle-hidden").forEach(box => box.classList.remove("toggle-hidden"));
    const formulas = [...document.querySelectorAll("div.math > .katex-display")];
    return formulas.filter(f => f.scrollWidth > f.clientWidth + 1).map(f => {
        const says = f.querySelector("annotation").textContent.trim();
        return {says, by: f.scrollWidth - f.clientWidth, reached: f.tabIndex === 0};
    });
}"""


@pytest.mark.parametrize("page", WRITTEN)
def test_display_formulas_fit_on_a_screen_and_can_be_scrolled_on_a_phone(page, server, browser):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(server + page, wait_until="networkidle")
    wide = tab.evaluate(CUT)
    tab.set_viewport_size({"width": 390, "height": 900})
    narrow = tab.evaluate(CUT)
    tab.close()
    assert not [(formula["says"], formula["by"]) for formula in wide], "break these into lines"
    assert not [formula["says"] for formula in narrow if not formula["reached"]], "the keyboard does not reach these"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("page", WRITTEN)
def test_a_browser_has_no_complaint(page, width, server, browser):
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if width == 390 else "light")
    complaints, foreign = [], []
    tab.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
    tab.on("response", lambda reply: complaints.append(f"{reply.status}: {reply.url}") if reply.status >= 400 else None)
    tab.on("request", lambda sent: None if sent.url.startswith((server, "data:")) else foreign.append(sent.url))
    tab.goto(server + page, wait_until="networkidle")
    wider = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    tab.close()
    assert not complaints
    assert not foreign
    assert wider <= 0, f"the page scrolls sideways by {wider} px"
