"""What is done to the written pages: which rules of a style sheet stay, how pictures shrink, what previews say."""

import importlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sources import ROOT

sys.path.insert(0, str(ROOT / "book/_ext"))
book_pages, book_site, book_styles = map(importlib.import_module, ("book_pages", "book_site", "book_styles"))


def bundled(tmp_path, css: str, pages=(), scripts=(), keep=()) -> str:
    sheet = tmp_path / "styles" / "one.css"
    sheet.parent.mkdir(exist_ok=True)
    sheet.write_text(css)
    return book_styles.bundle([sheet], tmp_path, list(pages), list(scripts), keep)


@pytest.mark.parametrize(
    ("selector", "stays"),
    [
        ("p", True),
        (".here", True),
        (".here > .gone", False),
        ("#part .here", True),
        ("#nowhere .here", False),
        (".by-script", True),
        (".inline", True),
        (".bs-anything", True),
        (".here:not(.gone)", True),
        ('html[data-theme="dark"] .here', True),
        (".gone::before", False),
    ],
)
def test_a_rule_stays_where_something_can_match_it(tmp_path, selector, stays):
    page = '<div id="part" class="here there"></div><script>e.classList.add("inline")</script>'
    css = bundled(tmp_path, f"{selector} {{ color: red }}", [page], ['x.className = "by-script"'], ("bs-",))
    assert ("color: red" in css) == stays


def test_of_several_selectors_the_possible_ones_stay(tmp_path):
    css = bundled(tmp_path, "@media print { .gone, .here { top: 0 } .gone { top: 1px } }", ['<p class="here">'])
    assert "".join(css.split()) == "@mediaprint{.here{top:0}}"


def test_rules_without_selectors_stay_and_empty_media_go(tmp_path):
    css = bundled(tmp_path, "@keyframes k { to { top: 0 } } @media print { .gone { top: 0 } } /* words */")
    assert "".join(css.split()) == "@keyframesk{to{top:0}}"


def test_addresses_follow_the_sheet_and_imports_stand_in_its_place(tmp_path):
    (tmp_path / "base.css").write_text("p { background: url('a.png') }")
    css = bundled(
        tmp_path, '@import "../base.css"; b { background: url(fonts/x.woff2?v=1), url(data:image/gif;base64,A) }'
    )
    assert 'url("a.png")' in css
    assert 'url("styles/fonts/x.woff2")' in css
    assert "data:image/gif;base64,A" in css
    assert css.index("p{") < css.index("b{")


def test_a_sheet_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"one\.css, line 1"):
        bundled(tmp_path, "p { color: red } }")


def test_pictures_shrink_where_no_eye_sees_it(tmp_path):
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    drawn = np.full((200, 300, 3), 255, dtype=np.uint8)
    drawn[40:60, 10:290] = (0, 114, 178)
    Image.fromarray(drawn).save(few, compress_level=0)
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(many)
    before = few.stat().st_size
    assert book_pages.shrink(few) == book_pages.shrink(many) == (300, 200)
    assert few.stat().st_size < before / 20
    with Image.open(few) as opened:
        assert np.array_equal(np.asarray(opened.convert("RGB")), drawn)
    with Image.open(many) as opened:
        assert np.array_equal(np.asarray(opened.convert("RGB")), noise)


def test_a_picture_is_shrunk_once(tmp_path, monkeypatch):
    picture, folder = tmp_path / "a.png", tmp_path / "kept"
    Image.new("RGB", (30, 20), (0, 114, 178)).save(picture, compress_level=0)
    original = picture.read_bytes()
    assert book_pages.shrunk(picture, folder) == (30, 20)
    small = picture.read_bytes()
    assert len(small) < len(original)
    picture.write_bytes(original)
    with monkeypatch.context() as patch:
        patch.setattr(book_pages, "shrink", lambda path: pytest.fail("shrunk again"))
        assert book_pages.shrunk(picture, folder) == (30, 20)
    assert picture.read_bytes() == small
    next(folder.glob("*.png")).write_bytes(small[:-20])  # a machine lost power
    picture.write_bytes(original)
    assert book_pages.shrunk(picture, folder) == (30, 20)
    assert picture.read_bytes() == small


def test_pictures_get_their_size_and_load_late(tmp_path):
    picture = (tmp_path / "a.png").resolve()
    html = '<p><img alt="seen" src="a.png" /> <img alt="wide" src="a.png" style="width: 50%"></p>'
    found = book_pages.lazily(html, tmp_path / "page.html", {picture: (300, 200)})
    assert found.count('loading="lazy"') == 2
    assert found.count('width="300" height="200"') == 1
    assert book_pages.lazily(found, tmp_path / "page.html", {picture: (300, 200)}) == found


def test_names_in_code_lose_their_marks_and_nothing_else():
    html = '<pre><span class="n">a</span><span class="o">=</span><span class="p">(</span></pre><span class="n">b</span>'
    found = book_pages.PRE.sub(lambda pre: book_pages.PLAIN_TOKEN.sub(r"\1", pre[0]), html)
    assert found == '<pre>a<span class="o">=</span>(</pre><span class="n">b</span>'


def test_numbers_in_sentences_look_as_in_print():
    def printed(text, after=""):
        return book_pages.PASTED.sub(book_pages.printed, f'<span class="pasted-text">{text}</span>{after}')

    def is_(text):
        return f'<span class="pasted-text">{text}</span>'

    assert printed("1.2e-12") == is_("1.2·10<sup>\N{MINUS SIGN}12</sup>")
    assert printed("3.90e+00") == is_("3.90")
    assert printed("3e+05") == is_("3·10<sup>5</sup>")
    assert printed("-0.52 ± 0.05") == is_("\N{MINUS SIGN}0.52 ±\N{NO-BREAK SPACE}0.05")
    assert printed("10000") == is_("10,000")
    assert printed("15%") == is_("15\N{NO-BREAK SPACE}%")
    assert printed("76.2", " % of") == is_("76.2") + "\N{NO-BREAK SPACE}% of"
    assert printed("`make it`").count("<code ") == 1
    assert book_pages.CELL.sub(book_pages.printed, "<td><p>4e+03</p></td>") == "<td><p>4·10<sup>3</sup></p></td>"
    assert book_pages.CELL.sub(book_pages.printed, "<td>-0.5 ± 0.3</td>") == (
        "<td>\N{MINUS SIGN}0.5 ±\N{NO-BREAK SPACE}0.3</td>"
    )
    for plain in ("recorded on 2026-11-23", "784-400-10", "1,831", "a half-open interval"):
        assert printed(plain) == is_(plain)


def test_the_link_of_a_symbol_has_a_name():
    math = '<span class="katex"><math><mi>x</mi><annotation encoding="application/x-tex">%s</annotation></math></span>'
    link = '<a class="sym reference internal" href="n.html#sym-x">' + math + "</a>"
    other = '<a class="reference internal" href="#eq">(1)</a>' + math % "y"
    found = book_pages.SYMBOL.sub(book_pages.named, link % r"\theta^*_{A}" + other)
    assert found.startswith('<a aria-label="symbol theta^*_ A" class="sym reference internal" href="n.html#sym-x">')
    assert found.endswith(other)
    assert found.count("aria-label") == 1


def test_a_repair_that_finds_nothing_ends_the_build():
    with pytest.raises(Exception, match=r"page\.html must hold .*fontawesome"):
        book_pages.mend("<html></html>", "page.html")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("", ""),
        ("https://a.b/c", "https://a.b/c/"),
        ("https://a.b/c/", "https://a.b/c/"),
        ("http://a.b", "http://a.b/"),
    ],
)
def test_the_address_of_the_site_ends_in_a_slash(address, expected):
    assert book_site.base(SimpleNamespace(html_baseurl=address)) == expected


@pytest.mark.parametrize("address", ["a.b/c", "/c/", "ftp://a.b", "https://a.b/c?d=e"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(Exception, match=r"baseurl in _config\.yml must be an address"):
        book_site.base(SimpleNamespace(html_baseurl=address))


def test_without_an_address_nothing_is_said_that_needs_one():
    preview = {"file": "p.png", "width": 2, "height": 1, "alt": "a picture"}
    config = SimpleNamespace(html_baseurl="", html_title="Book", book_preview=preview)
    without = book_site.tags(config, 'A "title"', "Words.", "")
    assert "og:title" in without
    assert "&quot;title&quot;" in without
    assert "og:image" not in without
    assert "og:url" not in without
    config.html_baseurl = "https://a.b/c"
    full = book_site.tags(config, "Title", "Words.", "https://a.b/c/x.html")
    assert 'content="https://a.b/c/_static/p.png"' in full
    assert 'content="https://a.b/c/x.html"' in full


def test_a_page_is_described_by_its_first_running_paragraph():
    from docutils import nodes

    section = nodes.section("", nodes.title(text="Title"))
    section += nodes.paragraph(text="Computed.", classes=["provenance"])
    section += nodes.admonition("", nodes.paragraph(text="You need: nothing."))
    section += nodes.paragraph("", "", nodes.Text("With "), nodes.math(text="n"), nodes.Text(" and\n"))
    section[-1] += nodes.math(text=r"\frac{1}{2}")
    section[-1] += nodes.Text(": " + "long " * 100)
    said = book_site.description(section, "the book")
    assert said.startswith("With n and …: long long")
    assert len(said) <= book_site.LENGTH + 1
    assert said.endswith("long…")
    assert book_site.description(nodes.section(), "the book") == "the book"
