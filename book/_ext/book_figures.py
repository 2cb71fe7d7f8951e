"""No picture without words: every image must say in its alternative text what is seen. And none too small to read."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from docutils import nodes
from sphinx.util import logging

logger = logging.getLogger(__name__)
MISSING = "a picture without alternative text; say what is seen, in at least %d characters (%s)"


def place(node):
    """The nearest node around a picture whose line is known: that of its cell."""
    while node.line is None and node.parent is not None:
        node = node.parent
    return node


def require_alt(app, doctree, docname) -> None:
    """Warn for each image, of a cell or of a figure, whose text is missing, too short, or the name of its file."""
    least = app.config.book_alt_least
    for image in doctree.findall(nodes.image):
        alt, name = image.get("alt", "").strip(), PurePosixPath(image.get("uri", "")).name
        if len(alt) < least or alt == name:
            logger.warning(MISSING, least, name, location=place(image), type="book", subtype="alt")
    for raw in doctree.findall(nodes.raw):
        for tag in re.findall(r"<img\b[^>]*>", raw.astext()):
            found = re.search(r"""\balt=(["'])(.*?)\1""", tag)
            if found is None or len(found[2].strip()) < least:
                logger.warning(MISSING, least, "HTML output", location=place(raw), type="book", subtype="alt")


def frame(app, doctree, docname) -> None:
    """Put each picture of a figure into a box of its own, which scrolls on a phone and which the keyboard reaches."""
    for image in list(doctree.findall(nodes.image)):
        if isinstance(image.parent, nodes.figure):
            opens = '<div class="ewc-picture" tabindex="0" role="group" aria-label="Picture">'
            box = [nodes.raw("", opens, format="html"), image, nodes.raw("", "</div>", format="html")]
            image.parent.replace(image, box)


def setup(app):
    """Look at the pages as they are written, when glued figures are in their place."""
    app.add_config_value("book_alt_least", 15, "env")
    app.connect("doctree-resolved", require_alt)
    app.connect("doctree-resolved", frame)
    return {"parallel_read_safe": False}
