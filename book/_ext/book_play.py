"""Figures to play with: the numbers that a cell hands over, as JSON in its page, and the script for such pages.

`ewc_plots.Playable` is displayed as a MIME bundle of its own. The cell's picture stays in the page as any other; the
script takes its place on the screen when it runs, and only then.
"""

from __future__ import annotations

import json
from typing import ClassVar

from docutils import nodes
from myst_nb.core.render import load_mime_renders

from book_model import PLAY_MIME

MARK = "ewc-play-data"
OPENS = f'<script type="application/json" class="{MARK}" data-kind="%s">'


class PlayData:
    """MIME renderer: the numbers in a script element, which no browser shows or runs."""

    mime_priority_overrides: ClassVar = [("*", PLAY_MIME, 1)]

    @staticmethod
    def handle_mime(renderer, data, inline):
        """A raw node for a figure to play with, None for every other kind of output."""
        if data.mime_type != PLAY_MIME or inline:
            return None
        # "</" would end the element; the escaped slash is the same character in JSON.
        numbers = json.dumps(data.content["data"], separators=(",", ":")).replace("</", r"<\/")
        text = OPENS % data.content["kind"] + numbers + "</script>"
        return [nodes.raw("", text, format="html")]


def add_script(app, pagename, templatename, context, doctree) -> None:
    """The script and its style on pages that need them: no other page pays for them."""
    if doctree is not None and any(MARK in raw.astext() for raw in doctree.findall(nodes.raw)):
        app.add_js_file("play.js", loading_method="defer")
        app.add_css_file("play.css")


def setup(app):
    """Register the renderer; MyST-NB looks for others among installed packages only."""
    if PlayData not in load_mime_renders():
        load_mime_renders().append(PlayData)
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
