"""What a term or a symbol means, shown where it is used: put into the page while it is built, asked of nobody later.

Links to the glossary and to the table of symbols work without this. For each of them that a page has, the page gets a
`template` element with the definition, which `apparatus.js` shows when the link is hovered or has the focus.
"""

from __future__ import annotations

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform

from book_symbols import row_of, symbol


def definitions(doctree: nodes.document) -> dict[str, nodes.Element]:
    """Id of each term on a page of glossaries -> its definition."""
    found = {}
    for item in doctree.findall(nodes.definition_list_item):
        meaning = item[-1]
        found |= {name: meaning for term in item.findall(nodes.term) for name in term["ids"]}
    return found


def copied(element: nodes.Element, docname: str) -> list[nodes.Node]:
    """The children of `element`, for another page: without ids, and with links that start there."""
    copies = [child.deepcopy() for child in element.children]
    for copy in copies:
        for node in copy.findall(nodes.Element):
            node["ids"] = []
            if isinstance(node, addnodes.pending_xref):
                node["refdoc"] = docname
    return copies


class Explain(SphinxPostTransform):
    """Append the definitions of what a page links to."""

    default_priority = 3  # while links are still roles
    formats = ("html",)

    def run(self, **kwargs):
        """One template a definition, at the end of the page."""
        here, env = self.env.docname, self.env
        meant: dict[str, nodes.Element] = {}
        objects = env.get_domain("std").objects
        places = {name.lower(): place for (kind, name), place in objects.items() if kind == "term"}
        for link in self.document.findall(addnodes.pending_xref):
            page, anchor = places.get(link.get("reftarget", "").lower(), (here, ""))
            if (link.get("refdomain"), link.get("reftype")) == ("std", "term") and page != here:
                if page not in env.book_definitions:
                    env.book_definitions[page] = definitions(env.get_doctree(page))
                meant[anchor] = env.book_definitions[page][anchor]
        for node in self.document.findall(symbol):
            row = row_of(env, here, node["key"])
            if row is not None and row.docname != here:
                meant[row.anchor] = nodes.container("", row.meaning.deepcopy())
        home = next(self.document.findall(nodes.section), self.document)
        for anchor, meaning in meant.items():
            home += nodes.raw("", f'<template id="about-{anchor}">', format="html")
            home.extend(copied(meaning, here))
            home += nodes.raw("", "</template>", format="html")


def begin(app, env, docnames) -> None:
    """Every build reads all pages."""
    env.book_definitions = {}


def setup(app):
    """Run before links are resolved."""
    app.setup_extension("book_symbols")
    app.connect("env-before-read-docs", begin)
    app.add_post_transform(Explain)
    return {"parallel_read_safe": False}
