"""Docstrings of the package as they are written: plain text with backticks for code, and indented blocks for formulas.

reStructuredText reads stars and bars as markup, which formulas are full of; they are escaped outside code.
"""

from __future__ import annotations

import re

CODE = re.compile(r"(``.*?``|`[^`]*`)")
MARKUP = re.compile(r"(?<!\\)([*|]|(?<=\w)_(?=\W|$))")


def indent(line: str) -> int:
    """Number of leading spaces."""
    return len(line) - len(line.lstrip())


def escape(line: str) -> str:
    """`line` with stars, bars and trailing underscores as characters; a bullet stays a bullet."""
    bullet = re.match(r"\s*\* ", line)
    start = bullet.end() if bullet else 0
    parts = CODE.split(line[start:])
    return line[:start] + "".join(part if i % 2 else MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape prose; make `text:`, a blank line and an indented block a literal block, which is left alone."""
    literal = None
    for i, line in enumerate(lines):
        if literal is not None and line.strip() and indent(line) <= literal:
            literal = None
        if literal is not None or not line.strip():
            continue
        rest = lines[i + 1 :]
        after = next((later for later in rest if later.strip()), "")
        opens = line.endswith(":") and after != "" and not rest[0].strip() and indent(after) > indent(line)
        lines[i] = escape(line) + (":" if opens and not line.endswith("::") else "")
        if opens:
            literal = indent(line)


def setup(app):
    """Run before napoleon reads the sections."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", as_written, priority=100)
    return {"parallel_read_safe": True}
