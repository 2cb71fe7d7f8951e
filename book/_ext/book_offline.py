"""Nothing from third parties: drop thebe, whose scripts load from a delivery network when used."""

from __future__ import annotations


def drop(app, pagename, templatename, context, doctree) -> None:
    """Remove thebe's files from a page; the book is not run in the browser."""
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, []) if "thebe" not in str(getattr(file, "filename", ""))]


def disconnect(app, config) -> None:
    """sphinx-thebe writes a block of settings into every page; its listeners go before they are called."""
    for listeners in app.events.listeners.values():
        listeners[:] = [listener for listener in listeners if "sphinx_thebe" not in listener.handler.__module__]


def setup(app):
    """Run after every other extension has added its scripts."""
    app.connect("config-inited", disconnect)
    app.connect("html-page-context", drop, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
