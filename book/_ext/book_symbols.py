r"""The table of symbols, and links to it: ``{sym}`theta` `` shows the symbol of the row `theta` and links to that row.

The notation page holds the table in a directive whose first column is the key of each row; it is not shown:

    ```{symbols}
    | key | in the text | in code | meaning |
    |---|---|---|---|
    | theta | $\theta$ | `theta` | parameters of a model |
    ```

With the option `chapter`, the symbols have that meaning in that chapter only, and its roles look there first. A role
shows the first formula of its row, or what it says itself: ``{sym}`\theta^*_A <mode>` ``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)
PUNCTUATION = re.compile(r"^[.,;:!?)]+|^'s\b")


class symbol(nodes.Inline, nodes.Element):
    """A role that was read and not yet linked."""


@dataclass(frozen=True)
class Row:
    """A row of the table: where it stands, its formulas, and what it means as nodes."""

    docname: str
    anchor: str
    forms: tuple[str, ...]
    meaning: nodes.Element


class Symbols(SphinxDirective):
    """The table, with an anchor for each row."""

    has_content = True
    option_spec: ClassVar = {"chapter": directives.unchanged_required}

    def run(self):
        """Parse the table as Markdown, then take the keys out of it."""
        chapter = self.options.get("chapter", "")
        box = nodes.container()
        self.state.nested_parse(self.content, self.content_offset, box)
        for table in box.findall(nodes.table):
            table["classes"].append("symbols")
        for group in box.findall(nodes.tgroup):
            group["cols"] -= 1
            group.remove(next(iter(group.findall(nodes.colspec))))
        for row in box.findall(nodes.row):
            key, *cells = row.children
            row.remove(key)
            if isinstance(row.parent, nodes.tbody):
                self.remember(key.astext().strip(), cells, chapter)
        return box.children

    def remember(self, key: str, cells: list[nodes.Element], chapter: str) -> None:
        """Give a row its anchor, and keep it for the roles."""
        anchor = f"sym-{chapter}-{key}" if chapter else f"sym-{key}"
        forms = tuple(formula.astext() for formula in cells[0].findall(nodes.math))
        if (chapter, key) in self.env.book_symbols or not forms:
            logger.warning("a symbol needs a key of its own and a formula: %s", key, location=self.get_location())
        cells[0].next_node(nodes.paragraph)["ids"].append(anchor)
        self.env.book_symbols[chapter, key] = Row(self.env.docname, anchor, forms, cells[-1].next_node(nodes.paragraph))


def role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Read ``{sym}`key` `` or ``{sym}`formula <key>` ``."""
    found = re.fullmatch(r"(.+?)\s*<([\w-]+)>", text, re.DOTALL)
    return [symbol("", key=found[2] if found else text.strip(), formula=found[1] if found else "")], []


def row_of(env, docname: str, key: str) -> Row | None:
    """The row that a role of a page means: the chapter's own, else the one of all."""
    return env.book_symbols.get((docname.rsplit("/", 1)[-1], key)) or env.book_symbols.get(("", key))


class Link(SphinxPostTransform):
    """Make links of the roles, when all pages have been read."""

    default_priority = 4

    def run(self, **kwargs):
        """Replace each role; the punctuation after it stays on its line."""
        for node in list(self.document.findall(symbol)):
            row = row_of(self.env, self.env.docname, node["key"])
            if row is None:
                logger.warning("no row %s in the table of symbols", node["key"], location=node.parent, type="book")
                node.replace_self(nodes.literal(text=node["key"]))
                continue
            formula = node["formula"] or row.forms[0]
            shown = nodes.math(formula, formula)
            if self.app.builder.format == "html":
                address = f"{self.app.builder.get_relative_uri(self.env.docname, row.docname)}#{row.anchor}"
                shown = nodes.reference("", "", shown, refuri=address, internal=True, classes=["sym"])
            together = nodes.inline("", "", shown, classes=["ewc-together"])
            after = node.next_node(descend=False, siblings=True)
            if isinstance(after, nodes.Text) and (found := PUNCTUATION.match(after)):
                together += nodes.Text(found[0])
                after.parent.replace(after, nodes.Text(after[found.end() :]))
            node.replace_self(together)


def begin(app, env, docnames) -> None:
    """Every build reads all pages."""
    env.book_symbols = {}


def setup(app):
    """Register role, directive and transform."""
    app.add_node(symbol)
    app.add_role("sym", role)
    app.add_directive("symbols", Symbols)
    app.connect("env-before-read-docs", begin)
    app.add_post_transform(Link)
    return {"parallel_read_safe": False}
