"""The last pass over the written pages: mend what the theme leaves undone, and leave out what no page needs.

The theme's templates offer no place for most of this, so that it is done to the text of the pages. Each repair looks
for an exact text and ends the build where that is gone: a new version of the theme cannot undo one in silence.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from PIL import Image
from sphinx.errors import ExtensionError

from book_styles import bundle, subset_icons

# What a page has before -> after, once or more often. An address is written relative to the page, so that patterns
# leave its beginning open.
MENDS = {
    # 1.5 MB of script that draws icons a second time: the theme's icon font draws them without it.
    r'\s*<!-- So that users can add custom icons -->\s*<script defer src="[^"]*fontawesome\.js[^"]*"></script>': "",
    # Known before the first line is drawn, or a dark page flashes white; without scripts the theme's default is light.
    r'(<html lang="[^"]*" data-content_root="[^"]*") data-theme="auto"': r"\1",
    r'document\.documentElement\.dataset\.theme = localStorage\.getItem\("theme"\) \|\| "auto";': (
        "document.documentElement.dataset.theme = { light: 'light', dark: 'dark' }"
        "[document.documentElement.dataset.mode] "
        "|| (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light');"
    ),
    # Landmarks and names, for those who hear the page.
    r'<div id="pst-primary-sidebar"': '<div role="complementary" aria-label="Book" id="pst-primary-sidebar"',
    r'<dialog id="pst-primary-sidebar-modal">': '<dialog aria-label="Book" id="pst-primary-sidebar-modal">',
    r'<dialog id="pst-search-dialog">': '<dialog aria-label="Search" id="pst-search-dialog">',
    # An icon is a character of a font, which would be read out.
    r'<(i|span) class="(fa[a-z]*(?: fa-[a-z-]+)+)"': r'<\1 aria-hidden="true" class="\2"',
}
# The same for what only some pages have.
SOMETIMES = {
    r'<dialog id="pst-secondary-sidebar-modal">': '<dialog aria-label="Contents" id="pst-secondary-sidebar-modal">',
    # A deprecated role, and a list whose children are no items.
    r' role="doc-biblioentry"': "",
    r'<div role="list" class="citation-list">': '<div class="citation-list">',
    # A mark that most fonts of the screen have.
    r"<td><p>✅</p></td>": "<td><p>✓ ran</p></td>",
    # The corner of a table heads nothing.
    r'<th class="head"><p></p></th>': "<td></td>",
}
SEARCH = re.compile(r'\s*<script src="[^"]*\b(?:searchtools|language_data|searchindex)\.js[^"]*"></script>')
VIEWPORT = re.compile(r'\s*<meta name="viewport"[^>]*>')
# Names, punctuation and spaces have the colour of plain code: no mark is needed to give it to them.
PLAIN_TOKEN = re.compile(r'<span class="(?:n|p|w|nn|nx|x)">([^<]*)</span>')
PRE = re.compile(r"<pre\b.*?</pre>", re.DOTALL)
STYLESHEET = re.compile(r'\s*<link\b(?=[^>]*\brel="stylesheet")[^>]*\bhref="([^"?#]+)[^"]*"[^>]*>')
# A link that holds nothing but a formula: only in theory is a link named after the MathML in it.
SYMBOL = re.compile(
    r'<a class="sym (?P<rest>[^>]*)>(?P<shown>(?:(?!</a>).)*?<annotation[^>]*>(?P<tex>[^<]*))', re.DOTALL
)
# A number that a cell computed, as print has it: a minus is no hyphen, a power of ten is one, and what belongs together
# is not broken over two lines.
PASTED = re.compile(r'(<span class="pasted-text">)([^<]*)(</span>)( %)?')
CELL = re.compile(r"(<td\b[^>]*>(?:<p>)?)([-+]?[\d.]+(?:e[-+]\d+)?(?: ± [\d.]+)?(?: ?%)?)(</)()")
FIGURES = {
    r"(?<![\w.])-(?=\d)": "\N{MINUS SIGN}",
    r"(?<=\d) · (?=10)": "·",
    r"(?<=\d)e[-+]0+\b": "",
    r"(?<=\d)e\+?0*(\d+)\b": r"·10<sup>\1</sup>",
    r"(?<=\d)e-0*(\d+)\b": "·10<sup>\N{MINUS SIGN}\\1</sup>",
    r"(?<=\d) ?%": "\N{NO-BREAK SPACE}%",
    r"(?<=\d) ± (?=\d)": " ±\N{NO-BREAK SPACE}",
    r"^(\d{2,3})(\d{3})$": r"\1,\2",
    r"`([^`]+)`": r'<code class="docutils literal notranslate"><span class="pre">\1</span></code>',
}
PICTURE = re.compile(r'<img\b(?![^>]*\bloading=)([^>]*?\bsrc="([^"]+)"[^>]*?)\s*/?>')


def mend(html: str, name: str) -> str:
    """One page with every repair."""
    for before, after in MENDS.items():
        html, count = re.subn(before, after, html)
        if not count:
            raise ExtensionError(f"{name} must hold {before!r}, and does not: see what the theme has there now")
    for before, after in SOMETIMES.items():
        html = re.sub(before, after, html)
    if name != "search.html":
        html = SEARCH.sub("", html)  # found nowhere but on the page that searches
    first = VIEWPORT.search(html)
    if first is not None:
        html = html[: first.end()] + VIEWPORT.sub("", html[first.end() :])
    if "bd-sidebar-secondary" not in html:  # the theme's script would fold a list of contents that is not there
        html = html.replace('class="beside popout', 'class="beside')
    html = SYMBOL.sub(named, html)
    html = CELL.sub(printed, PASTED.sub(printed, html))
    return PRE.sub(lambda pre: PLAIN_TOKEN.sub(r"\1", pre[0]), html)


def printed(pasted: re.Match) -> str:
    """A number in a sentence or in a cell of a table: 1.3·10⁻¹³ for 1.3e-13, 15 % for 15%."""
    text = pasted[2]
    for before, after in FIGURES.items():
        text = re.sub(before, after, text)
    return f"{pasted[1]}{text}{pasted[3]}" + ("\N{NO-BREAK SPACE}%" if pasted[4] else "")


def named(link: re.Match) -> str:
    r"""The link of a symbol with words for those who hear it: "symbol theta^*_A" for `\theta^*_A`."""
    words = " ".join(re.sub(r"[\\{}\s]+", " ", link["tex"]).split())
    return f'<a aria-label="symbol {words}" class="sym {link["rest"]}>{link["shown"]}'


def shrink(path: Path) -> tuple[int, int] | None:
    """Write a picture with a palette where no eye sees the difference; return its size in pixels."""
    with Image.open(path) as opened:
        if opened.format != "PNG":
            return opened.size
        image = opened.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        image = image.convert("RGB")
    method = Image.Quantize.MEDIANCUT if image.mode == "RGB" else Image.Quantize.FASTOCTREE
    few = image.quantize(256, method=method, dither=Image.Dither.NONE)
    partial = path.with_suffix(".partial")
    (few if close(image, few.convert(image.mode)) else image).save(partial, "PNG", optimize=True)
    if partial.stat().st_size < path.stat().st_size:
        partial.replace(path)
    else:
        partial.unlink()
    return image.size


def shrunk(path: Path, folder: Path) -> tuple[int, int] | None:
    """`shrink`, once for each picture: a build takes what an earlier one wrote into `folder`."""
    kept = folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()}.png"
    if kept.exists() and kept.read_bytes().endswith(b"IEND\xaeB`\x82"):  # whole: a machine may have lost power
        shutil.copyfile(kept, path)
        with Image.open(path) as opened:
            return opened.size
    size = shrink(path)
    folder.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(".partial")
    shutil.copyfile(path, partial)
    partial.replace(kept)
    return size


def close(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures differ by one level of 255 on average, and by 24 in one pixel of a thousand, at most."""
    import numpy as np

    apart = np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max(axis=-1)
    return bool(np.percentile(apart, 99.9) <= 24 and apart.mean() <= 1)


def lazily(html: str, page: Path, sizes: dict[Path, tuple[int, int]]) -> str:
    """Pictures load when they come near, and the page knows their size before."""

    def replace(found):
        attributes, address = found[1], found[2]
        size = sizes.get((page.parent / address).resolve())
        measured = (
            f' width="{size[0]}" height="{size[1]}"' if size and not re.search(r"\bwidth[=:]", attributes) else ""
        )
        return f'<img loading="lazy" decoding="async"{measured}{attributes}>'

    return PICTURE.sub(replace, html)


def one_stylesheet(pages: dict[Path, str], out: Path, keep: tuple[str, ...]) -> dict[Path, str]:
    """All style sheets as one, without the rules for what no page has."""
    order: list[Path] = []
    for page, html in pages.items():
        for address in STYLESHEET.findall(html):
            sheet = (page.parent / address).resolve()
            if sheet not in order:
                order.append(sheet)
    scripts = [path.read_text(encoding="utf-8") for path in sorted((out / "_static").rglob("*.js")) if used(path)]
    css = subset_icons(bundle(order, out / "_static", list(pages.values()), scripts, keep), out / "_static")
    name = f"site.{hashlib.sha256(css.encode()).hexdigest()[:12]}.css"
    (out / "_static" / name).write_text(css, encoding="utf-8")
    linked = {}
    for page, html in pages.items():
        root = "../" * (len(page.relative_to(out).parts) - 1)
        first = STYLESHEET.search(html)
        link = f'\n  <link rel="stylesheet" href="{root}_static/{name}">'
        linked[page] = html[: first.start()] + link + STYLESHEET.sub("", html[first.start() :])
    return linked


def used(script: Path) -> bool:
    """Whether the pages may run a script of the static folder."""
    return script.name != "fontawesome.js" and "locales" not in script.parts


def finish(app, exception) -> None:
    """Rewrite every page, after all extensions wrote theirs."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir).resolve()
    sizes = {}
    for picture in sorted([*(out / "_images").glob("*.png"), *(out / "_static").glob("*.png")]):
        sizes[picture] = shrunk(picture, out.parent / ".pictures")
    pages = {}
    for page in sorted(path for path in out.rglob("*.html") if "_static" not in path.relative_to(out).parts):
        html = page.read_text(encoding="utf-8")
        if '<article class="bd-article">' in html or 'class="bd-search-container"' in html:
            pages[page] = lazily(mend(html, str(page.relative_to(out))), page, sizes)
    for page, html in one_stylesheet(pages, out, tuple(app.config.book_keep_styles)).items():
        page.write_text(html, encoding="utf-8")
    for path in (out / "_static").rglob("*"):
        if path.name.endswith(".map") or path.name == "fontawesome.js":
            path.unlink()


def setup(app):
    """`book_keep_styles`: beginnings of class names that scripts put together, whose rules stay."""
    app.add_config_value("book_keep_styles", ["bs-", "tooltip", "toggle-"], "html")
    app.connect("build-finished", finish, priority=700)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
