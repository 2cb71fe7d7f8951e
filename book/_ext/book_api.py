"""Docstrings of the package as they are written: plain text with backticks for code, and indented blocks for formulas.

reStructuredText reads stars and bars as markup, which formulas are full of; they are escaped outside code.
"""

from __future__ import annotations

import re

CODE = re.compile(r"(``.*?``|`[^`]*`)")
MARKUP = re.compile(r"(?<!\\)([*|]|(?<=\w)_(?=\W|$))")
LETTER = re.compile(r"^(\s*(?:\w+: )?)([A-Za-z]\.)(?=\s|$)")  # "x: R." describes, it does not count


def indent(line: str) -> int:
    """Number of leading spaces."""
    return len(line) - len(line.lstrip())


def escape(line: str) -> str:
    """`line` with stars, bars and trailing underscores as characters; a bullet stays a bullet."""
    line = LETTER.sub(r"\1\\\2", line)
    bullet = re.match(r"\s*\* ", line)
    start = bullet.end() if bullet else 0
    parts = CODE.split(line[start:])
    return line[:start] + "".join(part if i % 2 else MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts))


def as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Escape prose; make an indented block after a blank line a literal block, which is left alone."""
    written: list[str] = []
    literal = None
    for i, line in enumerate(lines):
        if literal is not None and line.strip() and indent(line) <= literal:
            literal = None
        if literal is not None or not line.strip():
            written.append(line)
            continue
        rest = lines[i + 1 :]
        after = next((later for later in rest if later.strip()), "")
        opens = after != "" and not rest[0].strip() and indent(after) > indent(line)
        colon = opens and line.endswith(":") and not line.endswith("::")
        written.append(escape(line) + (":" if colon else ""))
        if opens:
            literal = indent(line)
            written += [] if line.endswith(":") else ["", " " * indent(line) + "::"]
    lines[:] = written


def setup(app):
    """Run before napoleon reads the sections."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", as_written, priority=100)
    return {"parallel_read_safe": True}
