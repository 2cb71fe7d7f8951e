"""What the tests know of a chapter's source: its parts, without building it."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Cell:
    """A code cell: its code, its tags, its line, and whether it stands in a solution."""

    code: str
    tags: list[str]
    line: int
    in_solution: bool


def pages() -> list[str]:
    """All documents of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def chapters() -> list[str]:
    """The documents of the numbered parts."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [chapter["file"] for part in toc["parts"] if part.get("numbered") for chapter in part["chapters"]]


def cells(text: str) -> list[Cell]:
    """The code cells of a MyST source."""
    found, in_solution, start, body = [], False, 0, None
    for line_number, line in enumerate(text.splitlines(), start=1):
        if body is None:
            if re.match(r"`{3,}\{solution-(start|end)\}", line):
                in_solution = "start" in line
            if re.match(r"`{3,}\{code-cell\}", line):
                start, body = line_number, []
        elif re.match(r"`{3,}\s*$", line):
            found.append(_cell(body, start, in_solution))
            body = None
        else:
            body.append(line)
    return found


def _cell(body: list[str], start: int, in_solution: bool) -> Cell:
    options: list[str] = []
    if body[:1] == ["---"]:
        end = body.index("---", 1)
        options, body = body[1:end], body[end + 1 :]
    else:
        while body and body[0].startswith(":"):
            options.append(body.pop(0)[1:])
    settings = yaml.safe_load("\n".join(options)) or {}
    return Cell("\n".join(body), list(settings.get("tags", [])), start, in_solution)


def prose(text: str) -> list[str]:
    """Paragraphs of a MyST source without code, mathematics, roles, link targets and quotations from papers."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"^(`{3,})\{(?:code-cell|math|eval-rst)\}.*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(`{3,})\w[^\n]*\n.*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    quoted = [part for part in re.split(r"\n\s*\n", text) if "{cite" not in part and "<!-- quoted -->" not in part]
    rules = [r"\{[\w:.-]+\}`[^`]*`", r"`[^`]*`", r"\$[^$]*\$", r"<!--.*?-->", r"\]\([^)]*\)", r"https?://\S+"]
    return [re.sub("|".join(rules), "", part, flags=re.DOTALL) for part in quoted]
