"""The built site: every link leads somewhere, nothing comes from a third party, and what it says of itself is true."""

import functools
import json
import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup
from PIL import Image

from sources import ROOT

pytestmark = pytest.mark.site

SITE = Path(os.environ.get("EWC_SITE", ROOT / "_build/html"))
PAGES = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if "_static" not in path.parts)
WRITTEN = [page for page in PAGES if page.startswith("book/")]
BASE = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["html"].get("baseurl", "")
BASE = BASE and BASE.rstrip("/") + "/"
PREFIX = (urlsplit(BASE).path.rstrip("/") if BASE else "") + "/"
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
        if page == "404.html" and parts.path:
            assert parts.path.startswith(PREFIX), "served at any depth, this page knows no relative addresses"
            parts = parts._replace(path=parts.path.removeprefix(PREFIX))
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


def of(page: str, **wanted: str) -> list[str]:
    """The contents of the meta elements of a page with a given name or property."""
    ((key, value),) = wanted.items()
    return [tag["content"] for tag in parsed(page).select(f'head meta[{key}="{value}"]')]


@pytest.mark.parametrize("page", PAGES)
def test_a_link_to_a_page_has_a_preview(page):
    assert len(of(page, property="og:title")) == 1
    assert of(page, property="og:description") == of(page, name="description")
    (text,) = of(page, name="description")
    assert 30 <= len(text) <= 201
    assert not re.search(r"[\\{}<>]|\$", text)
    if BASE and page != "404.html":
        picture = of(page, property="og:image")[0]
        assert picture.startswith(BASE)
        with Image.open(SITE / picture.removeprefix(BASE)) as opened:
            size = [of(page, property=f"og:image:{side}")[0] for side in ("width", "height")]
            assert list(map(str, opened.size)) == size
        assert len(of(page, property="og:image:alt")[0]) >= 15


def test_chapters_are_introduced_each_in_its_own_words():
    said = [of(page, name="description")[0] for page in WRITTEN]
    assert len(set(said)) >= len(said) - 2, "only pages without running text share the description of the book"


@pytest.mark.parametrize("page", PAGES)
def test_an_address_is_canonical_where_there_is_one(page):
    links = [tag["href"] for tag in parsed(page).select('link[rel="canonical"]')]
    expected = {"index.html": "book/index.html", "404.html": None}.get(page, page)
    assert links == ([BASE + expected] if BASE and expected else [])
    assert bool(of(page, name="robots")) == (page in ("404.html", "search.html"))


def test_the_sitemap_lists_the_pages():
    listed = re.findall(r"<loc>(.*?)</loc>", (SITE / "sitemap.xml").read_text(encoding="utf-8")) if BASE else []
    assert sorted(listed) == ([BASE + page for page in WRITTEN] if BASE else [])


def test_every_page_has_one_style_sheet_and_no_script_that_it_does_not_need():
    for page in PAGES:
        if page == "index.html":
            continue
        sheets = parsed(page).select('link[rel="stylesheet"]')
        assert len(sheets) == 1, page
        scripts = [Path(urlsplit(tag["src"]).path).name for tag in parsed(page).select("script[src]")]
        assert "fontawesome.js" not in scripts
        assert ("searchindex.js" in scripts) == (page == "search.html"), page
        assert len(scripts) == len(set(scripts)), page
