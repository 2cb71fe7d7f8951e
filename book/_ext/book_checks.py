"""A check on the page: one quiet line with an anchor, and the cell behind it folded, as are those that word the text.

`ewc_checks` displays a MIME bundle for every check. It is rendered here, so that the line looks the same whatever
the package writes as HTML, and so that the ledger can link to it.
"""

from __future__ import annotations

from typing import ClassVar

from docutils import nodes
from myst_nb.core.render import load_mime_renders

from book_model import CHECK_MIME, anchor

FOLDED = {"check": "the check", "words": "how the text gets its numbers"}
MANY = 12  # check lines of one cell that a reader is asked to scroll past
SHARED_IDS = {"exercise-content", "solution-content", "proof", "proof-content"}


def number(value) -> str:
    """A value as the ledger prints it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(number, value)) + "]"
    if isinstance(value, dict):
        return ", ".join(f"{name} {number(part)}" for name, part in value.items())
    return str(value)


def numbers(entry: dict) -> str:
    """The key numbers of a check in one line."""
    return "; ".join(f"{name} = {number(value)}" for name, value in (entry.get("values") or {}).items())


class CheckLine:
    """MIME renderer: one quiet line for a check."""

    mime_priority_overrides: ClassVar = [("*", CHECK_MIME, 1)]

    @staticmethod
    def handle_mime(renderer, data, inline):
        """A paragraph for a check, None for every other kind of output."""
        if data.mime_type != CHECK_MIME or inline:
            return None
        entry = data.content
        line = nodes.paragraph(classes=["ewc-check", f"ewc-{entry['kind']}"], ids=[anchor(entry["name"])])
        verb = "Proved" if entry["kind"] == "identity" else "Checked"
        line += nodes.inline(text="✓ ", classes=["tick"])
        line += nodes.inline(text=f"{verb}: {entry['name']}")
        if numbers(entry):
            line += nodes.inline(text=f" ({numbers(entry)})", classes=["numbers"])
        return [line]


def fold_cells(app, doctree) -> None:
    """Hide the input of cells with a tag in `FOLDED`; MyST-NB folds what carries a `hide_mode`."""
    for cell in doctree.findall(nodes.container):
        for tag, what in FOLDED.items():
            if f"tag_{tag}" in cell["classes"] and not cell.get("hide_mode"):
                cell["hide_mode"] = "input"
                cell["prompt_show"], cell["prompt_hide"] = f"Show {what}", f"Hide {what}"
        if "cell_output" in cell["classes"]:
            lines = sum("ewc-check" in line["classes"] for line in cell.findall(nodes.paragraph))
            if lines > MANY:  # browsers open the block for a link from the ledger to a line in it
                summary = f'<details class="ewc-checks"><summary>✓ {lines} checks hold: show them</summary>'
                cell.insert(0, nodes.raw("", summary, format="html"))
                cell += nodes.raw("", "</details>", format="html")
    for n, node in enumerate(doctree.findall(nodes.Element)):
        # sphinx-exercise and sphinx-proof give all their blocks the same few ids, and a page may not use an id twice.
        if SHARED_IDS.intersection(node.get("ids", ())):
            node["ids"] = [f"{name}-{n}" if name in SHARED_IDS else name for name in node["ids"]]


def setup(app):
    """Register the renderer; MyST-NB looks for others among installed packages only."""
    if CheckLine not in load_mime_renders():
        load_mime_renders().append(CheckLine)
    app.connect("doctree-read", fold_cells)
    return {"parallel_read_safe": True}
