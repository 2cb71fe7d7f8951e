"""The way from a chapter to its notebook in Colab: a button at the top of the page, and a link under its title."""

from __future__ import annotations

from docutils import nodes

TEXT = "Open this chapter in Colab"


def address(config, docname: str) -> str:
    """Where Colab finds the notebook: in the repository that `_config.yml` names."""
    options = config.html_theme_options
    path = options["repository_url"].removeprefix("https://github.com/").strip("/")
    name = docname.rsplit("/", 1)[-1]
    branch = options.get("repository_branch") or "main"
    return f"https://colab.research.google.com/github/{path}/blob/{branch}/notebooks/{name}.ipynb"


def is_chapter(app, docname: str) -> bool:
    """Whether the page is an executed one of a numbered part; only those have a notebook."""
    chapter = app.book.chapters.get(docname)
    return chapter is not None and chapter.numbered and bool(app.config.html_theme_options.get("repository_url"))


def add_button(app, pagename, templatename, context, doctree) -> None:
    """A button beside the theme's own."""
    if "header_buttons" in context and is_chapter(app, pagename):
        button = {"type": "link", "url": address(app.config, pagename), "text": "Colab", "tooltip": TEXT}
        context["header_buttons"].insert(0, button | {"label": "colab"})


def add_link(app, doctree) -> None:
    """The same in words, in the line that says how the page was computed."""
    if not is_chapter(app, app.env.docname):
        return
    for line in doctree.findall(lambda node: "provenance" in getattr(node, "attributes", {}).get("classes", ())):
        link = nodes.reference("", TEXT, refuri=address(app.config, app.env.docname), internal=False)
        line += [nodes.Text(" "), link, nodes.Text(".")]
        break


def setup(app):
    """After the line is there, and after the theme made its buttons."""
    app.connect("doctree-read", add_link, priority=900)
    app.connect("html-page-context", add_button, priority=800)
    return {"parallel_read_safe": False}
