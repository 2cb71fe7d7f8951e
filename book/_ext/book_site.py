"""What the site says of itself: previews of links, canonical addresses, a sitemap, a page for wrong addresses.

All absolute addresses follow from `html: baseurl` in `_config.yml`. Without it the site is whole and works anywhere; it
only lacks what cannot be said without an address: canonical addresses, pictures of previews, the sitemap.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.errors import ExtensionError

MISSING = "404"
LENGTH = 200  # characters that previews show of a description
FORMULA = re.compile(r"\\[A-Za-z]+|[{}$^_]")
OFFLINE = "if (location.protocol === 'file:') DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;"
NOT_FOUND = """<section id="not-found">
<h1>There is no page at this address</h1>
<p>It may have moved, or the link that led here is mistyped. The <a href="{root}">first page</a> lists all chapters,
the <a href="{search}">search</a> looks through the text of all of them, and the <a href="{index}">index</a> through the
names of the package.</p>
</section>"""
FORWARD = """<!DOCTYPE html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<meta http-equiv="refresh" content="0; url={target}">
{tags}
</head>
<body><main><h1>{title}</h1><p><a href="{target}">Read the book.</a></p></main></body>
</html>
"""


def base(config) -> str:
    """The address of the site with a slash at its end, or nothing."""
    address = config.html_baseurl or ""
    parts = urlsplit(address)
    if address and (parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment):
        raise ExtensionError(
            f"html: baseurl in _config.yml must be an address such as https://name.github.io/book/; got {address!r}"
        )
    return address.rstrip("/") + "/" if address else ""


def spoken(paragraph: nodes.paragraph) -> str:
    """A paragraph as one line of text; None of its formulas can be shown in a preview, short symbols are kept."""
    parts = []
    for node in paragraph.findall(nodes.Text):
        formula = isinstance(node.parent, nodes.math)
        parts.append("…" if formula and FORMULA.search(node.astext()) else node.astext())
    return " ".join("".join(parts).split())


def shorten(text: str) -> str:
    """At most `LENGTH` characters, cut between words."""
    return text if len(text) <= LENGTH else text[:LENGTH].rsplit(" ", 1)[0].rstrip(" ,.;:") + "…"


def description(doctree, default: str) -> str:
    """The first paragraph of a page's running text: not in a box, a list, a table or an output."""
    for paragraph in doctree.findall(nodes.paragraph) if doctree is not None else ():
        running = isinstance(paragraph.parent, nodes.section) and not paragraph["classes"]
        if running and (text := spoken(paragraph)):
            return shorten(text)
    return default


def tags(config, title: str, text: str, address: str, kind: str = "article") -> str:
    """Open Graph and its kin for one page; `address` is empty when nobody knows where the site will stand."""
    properties = {
        "og:title": title,
        "og:description": text,
        "og:type": kind,
        "og:site_name": config.html_title,
        "og:url": address,
    }
    if address and config.book_preview:
        properties |= {
            "og:image": base(config) + "_static/" + config.book_preview["file"],
            "og:image:width": config.book_preview["width"],
            "og:image:height": config.book_preview["height"],
            "og:image:alt": config.book_preview["alt"],
        }
    lines = [f'<meta name="description" content="{escape(text)}">']
    lines += [f'<meta property="{key}" content="{escape(str(value))}">' for key, value in properties.items() if value]
    lines.append(f'<meta name="twitter:card" content="{"summary_large_image" if address else "summary"}">')
    return "\n".join(lines)


def introduce(app, pagename, templatename, context, doctree) -> None:
    """Put the tags into a page's head."""
    title = re.sub(r"<[^>]+>", "", context.get("title") or "") or app.config.html_title
    if pagename == MISSING:
        context["pageurl"] = None
    first = pagename == app.config.root_doc
    address = (base(app.config) and context.get("pageurl")) or ""
    text = description(doctree, app.config.book_description)
    found = context.get("metatags", "") + tags(app.config, title, text, address, "book" if first else "article")
    if pagename in (MISSING, "search"):
        found += '\n<meta name="robots" content="noindex">'
    if pagename == "search":
        # Summaries of results are read from the pages themselves, which a browser refuses to do for files.
        app.add_js_file(None, body=OFFLINE)
    context["metatags"] = found + "\n"


def not_found(app):
    """The page that a server shows for a wrong address."""
    if app.builder.format != "html":
        return
    uri = app.builder.get_target_uri
    body = NOT_FOUND.format(root=uri(app.config.root_doc), search=uri("search"), index=uri("genindex"))
    yield MISSING, {"title": "There is no page at this address", "body": body}, "page.html"


def publish(app, exception) -> None:
    """Write what stands beside the pages: sitemap, robots.txt, and the page at the site's own address."""
    if exception is not None or app.builder.format != "html":
        return
    out, config, address = Path(app.outdir), app.config, base(app.config)
    uri = app.builder.get_target_uri

    # Served for addresses of any depth, this page can name nothing relative to itself.
    path, page = urlsplit(address).path or "/", out / f"{MISSING}.html"
    html = page.read_text(encoding="utf-8")
    html = re.sub(r'\b(href|src|action|data-content_root)="(?!#|/|[a-z]+:)(?:\./)?([^"]*)"', rf'\1="{path}\2"', html)
    page.write_text(html, encoding="utf-8")

    target = uri(config.root_doc)
    if target != "index.html":
        canonical = f'<link rel="canonical" href="{escape(address + target)}">\n' if address else ""
        head = canonical + tags(
            config, config.html_title, config.book_description, address and address + target, "book"
        )
        language = config.language or "en"
        forward = FORWARD.format(language=language, title=escape(config.html_title), target=target, tags=head)
        (out / "index.html").write_text(forward, encoding="utf-8")

    if address:
        pages = [uri(config.root_doc), *(uri(name) for name in sorted(app.env.found_docs - {config.root_doc}))]
        listed = "".join(f"  <url><loc>{escape(address + page)}</loc></url>\n" for page in pages)
        xml = f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{listed}</urlset>\n'
        (out / "sitemap.xml").write_text('<?xml version="1.0" encoding="UTF-8"?>\n' + xml, encoding="utf-8")
        if path == "/":  # crawlers ask for it at the root of a host only
            (out / "robots.txt").write_text(
                f"User-agent: *\nAllow: /\n\nSitemap: {address}sitemap.xml\n", encoding="utf-8"
            )


def setup(app):
    """`book_preview` names the picture below `_static` with its size and words; `book_description` the whole book."""
    app.add_config_value("book_preview", {}, "html")
    app.add_config_value("book_description", "", "html")
    app.connect("html-page-context", introduce, priority=800)
    app.connect("html-collect-pages", not_found)
    app.connect("build-finished", publish, priority=800)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
