"""The document that is printed as the PDF: all pages, in order, every link within it."""

import json
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from bs4 import BeautifulSoup

import sources

sys.path.insert(0, str(sources.ROOT / "tools"))
import make_pdf


def site(folder, **pages):
    """A tiny built site, and a table of contents for it."""
    for name, body in pages.items():
        page = folder / f"_build/html/book/{name}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(f'<html><article class="bd-article"><section id="top">{body}</section></article></html>')
    build = {"scale": "smoke", "hardware": "a machine", "versions": {"torch": "2"}}
    (folder / "_build/html/book/ledger.json").write_text(json.dumps({"build": build}))
    (folder / "_config.yml").write_text("title: A book\nauthor: somebody\n")
    rest = ", ".join(f"{{file: book/{name}}}" for name in list(pages)[1:])
    (folder / "_toc.yml").write_text(
        f"root: book/{next(iter(pages))}\nparts: [{{caption: Part, chapters: [{rest}]}}]\n"
    )


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(make_pdf, "ROOT", tmp_path)
    monkeypatch.setattr(make_pdf, "SITE", tmp_path / "_build/html")
    return tmp_path


def test_links_between_pages_become_links_within(small):
    (small / "_build/html").mkdir(parents=True)
    site(
        small,
        one='<h1>One</h1><a href="two.html#place">there</a> <a href="../search.html">search</a> <button>x</button>',
        two='<h1>Two</h1><h2 id="place">Place</h2><details>open me</details><a href="https://doi.org/1">paper</a>',
    )
    html = BeautifulSoup(make_pdf.document({"book/one": 3}), "html.parser")
    there, search, paper = html.select("article a")
    assert there["href"] == "#book/two#place"
    assert html.find(id="book/two#place").name == "h2"
    assert "href" not in search.attrs
    assert paper["href"] == "https://doi.org/1"
    assert html.details.has_attr("open")
    assert not html.select("button")
    assert [tag.get_text() for tag in html.select("nav .at")] == ["3"]


def test_a_page_that_was_not_built_is_named(small):
    (small / "_build/html").mkdir(parents=True)
    site(small, one="<h1>One</h1>", two="<h1>Two</h1>")
    (small / "_build/html/book/two.html").unlink()
    with pytest.raises(SystemExit, match=r"two.html is not there: .*run `make html`"):
        make_pdf.document({})


@pytest.mark.site
def test_the_book_in_print_is_whole():
    html = BeautifulSoup(make_pdf.document({}), "html.parser")
    assert [tag["id"] for tag in html.select("article")] == sources.pages()
    ids = [tag["id"] for tag in html.select("[id]") if tag.find_parent("svg") is None]
    assert len(ids) == len(set(ids))
    lost = [tag["href"] for tag in html.select('a[href^="#"]') if tag["href"][1:] not in set(ids)]
    assert not lost
    for tag in html.select("img[src]"):
        parts = urlsplit(tag["src"])
        assert parts.scheme in ("file", "data"), tag["src"]
        assert parts.scheme == "data" or Path(parts.path).is_file()
    assert not html.select("script, button, .katex-error")
