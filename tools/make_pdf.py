"""The whole book as one printable PDF, from the pages that were built: `make pdf`, into _build/pdf/book.pdf.

The pages are put one after another into one document, links between them become links within it, what is folded is
opened, and Chromium prints it. It is printed twice: the first time tells on which page each chapter and section begins.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parent.parent
SITE, FOLDER = ROOT / "_build/html", ROOT / "_build/pdf"
PARTS_OF_THE_SCREEN = (
    "a.headerlink, button, script, .toggle-button, .copybtn, .tag_check details.hide, .sd-stretched-link, "
    ".play-controls, noscript"
)
FOOTER = (
    '<div style="width: 100%; font: 8pt sans-serif; color: #555; text-align: center">'
    '<span class="pageNumber"></span></div>'
)


def contents() -> list[tuple[str, list[str]]]:
    """(caption, pages) of each part, as in the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    parts = [(part["caption"], [chapter["file"] for chapter in part["chapters"]]) for part in toc["parts"]]
    return [("", [toc["root"]]), *parts]


def article(page: str, pages: set[str]) -> Tag:
    """The text of one page, with ids and links that are unique in the whole document."""
    path = SITE / f"{page}.html"
    if not path.exists():
        raise SystemExit(
            f"{path.relative_to(ROOT)} is not there: the PDF is made from the built site; run `make html`."
        )
    text = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser").select_one("article.bd-article")
    for tag in text.select(PARTS_OF_THE_SCREEN):
        tag.decompose()
    for box in text.select("details"):
        box["open"] = ""
    for tag in text.select("[id]"):
        tag["id"] = f"{page}#{tag['id']}"
    for tag in text.select("a[href]"):
        parts = urlsplit(tag["href"])
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        name = target.relative_to(SITE).with_suffix("").as_posix() if target.is_relative_to(SITE) else ""
        if name in pages:
            tag["href"] = f"#{name}#{unquote(parts.fragment)}" if parts.fragment else f"#{name}"
        else:
            del tag["href"]  # the search page, the index: not in print
    for tag in text.select("[src]"):
        if not urlsplit(tag["src"]).scheme:
            tag["src"] = (path.parent / unquote(tag["src"])).resolve().as_uri()
        tag.attrs.pop("loading", None)  # in print nothing comes near the screen
    text.name = "article"
    text["id"], text["class"] = page, ["chapter"]
    return text


def document(begins: dict[str, int]) -> str:
    """All of the book as one page of HTML; `begins` has the printed page number of each heading's id."""
    parts = contents()
    names = {page for _, inside in parts for page in inside}
    build = json.loads((SITE / "book/ledger.json").read_text(encoding="utf-8"))["build"]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    styles = ["_static/pygments.css", "_static/katex/katex.min.css", "_static/print.css"]
    sheets = "".join(f'<link rel="stylesheet" href="{(SITE / sheet).as_uri()}">' for sheet in styles)
    lines, body = [], []
    for caption, inside in parts:
        if caption:
            lines.append(f'<li class="part">{caption}</li>')
        for page in inside:
            text = article(page, names)
            for level, heading in enumerate((text.select_one("h1"), *text.select("h2"))):
                if heading is None:
                    raise SystemExit(f"{page}: no title")
                place = heading.find_parent("section")["id"] if level else page
                kind = "section" if level else "chapter"
                number = f'<span class="at">{begins[place]}</span>' if place in begins else ""
                lines.append(f'<li class="{kind}"><a href="#{place}">{heading.decode_contents()}</a>{number}</li>')
            body.append(str(text))
    what = f"Computed at {build['scale']} scale on {build['hardware']}, torch {build['versions']['torch']}."
    note = (
        "Solutions follow their exercises. The code of the checks is on the pages and in the sources; "
        "here stands what each of them proved or tested."
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{config["title"]}</title>{sheets}</head>'
        f'<body><header class="title"><h1>{config["title"]}</h1><p>From Bayes\' rule to running code</p>'
        f"<p>{config['author']}</p><p>{what}</p><p>{note}</p></header>"
        f'<nav class="contents"><h1>Contents</h1><ol>{"".join(lines)}</ol></nav>{"".join(body)}</body></html>'
    )


def print_to(path: Path, html: Path) -> None:
    """Print with Chromium, bookmarks and tags for screen readers included."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("Chromium prints the PDF and is not on PATH; install it (Debian: apt-get install chromium).")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(html.as_uri(), wait_until="load")
        tab.evaluate("document.fonts.ready")
        wide = tab.evaluate(
            "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src).slice(0, 3)"
        )
        if wide:
            raise SystemExit(f"these pictures were not found: {wide}")
        tab.pdf(
            path=str(path),
            format="A4",
            margin={"top": "20mm", "bottom": "20mm", "left": "22mm", "right": "22mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            print_background=True,
            outline=True,
            tagged=True,
        )
        browser.close()


def beginnings(path: Path) -> dict[str, int]:
    """Printed page, counted from 1, of each named place that a link leads to."""
    from pypdf import PdfReader

    reader = PdfReader(path)
    named = reader.named_destinations.items()
    return {unquote(name.lstrip("/")): reader.get_destination_page_number(place) + 1 for name, place in named}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    html, partial, final = FOLDER / "book.html", FOLDER / "partial.pdf", FOLDER / "book.pdf"
    begins: dict[str, int] = {}
    for _ in range(3):  # page numbers in the contents may move what follows by a page, once
        html.write_text(document(begins), encoding="utf-8")
        print_to(partial, html)
        found = beginnings(partial)
        if found == begins:
            break
        begins = found
    else:
        sys.exit("page numbers did not settle after three passes")
    partial.replace(final)
    pages = max(begins.values())
    print(f"{final.relative_to(ROOT)}: {pages} pages or more, {final.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
