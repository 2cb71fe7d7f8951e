"""The ledger: one table of all checks of this build, with links to where they stand, and `ledger.json`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from book_checks import numbers
from book_model import anchor

logger = logging.getLogger(__name__)


def judge(app, env) -> None:
    """Every chapter has checks, and no two of one chapter share a name."""
    for docname, chapter in app.book.chapters.items():
        if chapter.numbered and not chapter.checks:
            logger.warning("a chapter without a single check", location=docname, type="book", subtype="ledger")
        for name, count in Counter(anchor(entry["name"]) for entry in chapter.checks).items():
            if count > 1:
                logger.warning("%d checks named %s", count, name, location=docname, type="book", subtype="ledger")
        for entry in chapter.checks:
            if entry["ok"] is not True:
                logger.warning("failed check: %s", entry["name"], location=docname, type="book", subtype="ledger")


def link(refdoc: str, docname: str, text: str, target: str = "") -> nodes.Node:
    """A paragraph with a link to a document, or to an anchor in it."""
    if target:
        reference = addnodes.pending_xref(refdomain="book", reftype="check", reftarget=f"{docname}#{target}")
    else:
        reference = addnodes.pending_xref(refdomain="std", reftype="doc", reftarget=f"/{docname}", refexplicit=True)
    reference["refdoc"], reference["refwarn"] = refdoc, True
    reference += nodes.inline(text=text)
    return nodes.paragraph("", "", reference)


def resolve_check(app, env, node, contnode):
    """Turn the ledger's references to checks into links; they need no registry, the anchor follows from the name."""
    if node.get("refdomain") != "book":
        return None
    docname, target = node["reftarget"].split("#")
    uri = app.builder.get_relative_uri(node["refdoc"], docname)
    return nodes.reference("", "", contnode, refuri=f"{uri}#{target}", internal=True)


def table(titles: list[str], rows: list[list[nodes.Node | str]], classes: list[str]) -> nodes.table:
    """A docutils table from cells that are text or nodes."""
    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in titles), cols=len(titles))
    for part, content in ((nodes.thead(), [titles]), (nodes.tbody(), rows)):
        for row in content:
            cells = [nodes.paragraph(text=cell) if isinstance(cell, str) else cell for cell in row]
            part += nodes.row("", *(nodes.entry("", cell) for cell in cells))
        group += part
    return nodes.table("", group, classes=classes)


class Ledger(SphinxDirective):
    """All checks of this build, a table for each chapter."""

    def run(self):
        """Build the sections; the checks were read before any page was."""
        here, sections = self.env.docname, []
        for docname, chapter in self.env.app.book.chapters.items():
            if not chapter.checks:
                continue
            section = nodes.section("", nodes.title(text=chapter.title), ids=[f"checks-of-{chapter.name}"])
            section += link(here, docname, f"Chapter: {chapter.title}")
            rows = [
                [entry["kind"], link(here, docname, entry["name"], anchor(entry["name"])), "✓ holds", numbers(entry)]
                for entry in chapter.checks
            ]
            section += table(["kind", "check", "status", "numbers"], rows, ["ledger"])
            sections.append(section)
        return sections or [nodes.paragraph(text="No chapter of this build has a check.")]


def write_json(app, exception) -> None:
    """Write `book/ledger.json` beside the page, only when the build came to its end."""
    if exception is not None or app.builder.format != "html":
        return
    book = app.book
    build = {key: value for key, value in asdict(book).items() if key != "chapters"}
    build["seconds_per_chapter"] = {chapter.name: chapter.seconds for chapter in book.chapters.values()}
    build["megabytes_per_chapter"] = {chapter.name: chapter.peak_megabytes for chapter in book.chapters.values()}
    build["titles"] = {chapter.name: chapter.title for chapter in book.chapters.values()}
    build["results"] = {chapter.name: chapter.glued for chapter in book.chapters.values() if chapter.glued}
    entries = [{"chapter": chapter.name, **entry} for chapter in book.chapters.values() for entry in chapter.checks]
    text = json.dumps({"build": build, "entries": entries}, indent=1, ensure_ascii=False)
    (Path(app.outdir) / "book" / "ledger.json").write_text(text + "\n", encoding="utf-8")


def setup(app):
    """Register the directive and the gates."""
    app.add_directive("ledger", Ledger)
    app.connect("env-updated", judge)
    app.connect("missing-reference", resolve_check)
    app.connect("build-finished", write_json)
    return {"parallel_read_safe": False}
