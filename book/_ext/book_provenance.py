"""Say on the pages what they were computed with: a banner for the sample, a line on each chapter, a table."""

from __future__ import annotations

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from book_ledger import table

DATA = {"full": "images of the full data sets", "sample": "images of the embedded sample"}


def announce(app) -> None:
    """A banner on every page when the numbers come from the sample."""
    if app.book.data_source == "sample":
        app.config.html_theme_options["announcement"] = (
            "This build did without the full data sets (not there, not reachable, or not asked for). Every number "
            "comes from the embedded sample: 500 training and 100 test images of each class."
        )


def note(app, doctree) -> None:
    """One line under the title of an executed page."""
    chapter = app.book.chapters.get(app.env.docname)
    title = next(doctree.findall(nodes.title), None)
    if chapter is None or not chapter.numbered or title is None:
        return
    book = app.book
    text = f"Computed at {book.scale} scale from {DATA[book.data_source]}, device {book.device}"
    if chapter.seconds is not None:
        text += f", in {chapter.seconds:.0f} s" if chapter.seconds >= 1 else ", in under a second"
    title.parent.insert(title.parent.index(title) + 1, nodes.paragraph(text=text + ".", classes=["provenance"]))


class BuildInfo(SphinxDirective):
    """A table of what this build ran on."""

    def run(self):
        """Settings first, then versions."""
        book = self.env.app.book
        rows = [
            ["scale", book.scale],
            ["data", DATA[book.data_source].removeprefix("images of ")],
            ["device", book.device],
            ["hardware", book.hardware],
            ["threads of torch", str(book.threads)],
            *([name, version] for name, version in book.versions.items()),
        ]
        return [table(["what", "this build"], rows, ["build-info"])]


class ChapterCosts(SphinxDirective):
    """Seconds and peak memory of each executed page."""

    def run(self):
        """In the order of the table of contents, with a total."""
        chapters = list(self.env.app.book.chapters.values())
        rows = [
            [
                chapter.title,
                "" if chapter.seconds is None else f"{chapter.seconds:.1f}",
                "not recorded" if chapter.peak_megabytes is None else f"{chapter.peak_megabytes}",
            ]
            for chapter in chapters
        ]
        memory = max((chapter.peak_megabytes or 0 for chapter in chapters), default=0)
        total = sum(chapter.seconds or 0 for chapter in chapters)
        rows.append(["together (seconds), largest (memory)", f"{total:.1f}", str(memory or "not recorded")])
        return [table(["page", "seconds", "peak memory of its kernel, MB"], rows, ["build-costs"])]


def setup(app):
    """Register the directives, the banner and the line."""
    app.add_directive("build-info", BuildInfo)
    app.add_directive("chapter-costs", ChapterCosts)
    app.connect("builder-inited", announce, priority=100)
    app.connect("doctree-read", note)
    return {"parallel_read_safe": False}
