"""Write each chapter as a notebook for Colab and Jupyter, from its source: `make notebooks`, into notebooks/.

Nothing of the book's markup is left in them: what Sphinx would number is numbered here in the same order, references
become links, formulas get the book's macros written out, and sentences with computed numbers become cells that show
them (`checks.say`). What this file does not know is an error that names the line, so that no new markup slips through.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from urllib.parse import quote

import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book/_ext"))
from book_exercises import starters  # noqa: E402

FOLDER = ROOT / "notebooks"
SETUP = """\
# Set-up. Installs the book's package where it is missing, and leaves torch, torchvision and numpy as they are.
# Running it again does no harm.
SCALE = "laptop"  # <- the line to change: "smoke" takes seconds, "laptop" minutes, "paper" wants a GPU
ADDRESS = "ewc-code @ git+{url}@{branch}"

import importlib
import os
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

os.environ["EWC_SCALE"] = SCALE
if util.find_spec("ewc_code") is None:
    present = [name for name in ("torch", "torchvision", "numpy") if util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.txt"  # pip may add to these, never replace them
        kept.write_text("".join(f"{{name}}=={{metadata.version(name)}}\\n" for name in present))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(kept), ADDRESS]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The book's package could not be installed from {{ADDRESS}}:\\n{{done.stderr[-2000:]}}")
    importlib.invalidate_caches()

from ewc_checks import provenance, say
from ewc_code import data, environment

print("device:", provenance.hardware())
print("scale: ", environment.scale())
print("data:  ", data.source())
"""
FENCE, COLONS = re.compile(r"(`{3,})(?:\{([\w:-]+)\})?\s*(.*)$"), re.compile(r"(:{3,})\{([\w:-]+)\}\s*(.*)$")
LABEL, HEADING = re.compile(r"\(([\w-]+)\)=\s*$"), re.compile(r"(#+) (.+)$")
INLINE = re.compile(
    r"\{(?P<role>[\w:-]+)\}`(?P<target>[^`]+)`|(?P<code>`[^`]+`)|(?P<comment>\s*<!--.*?-->)"
    r"|\$\$(?P<display>.+?)\$\$[ \t]*(?:\((?P<label>[\w-]+)\))?|\$(?P<inline>[^$]+?)\$",
    re.DOTALL,
)
PROVED = ("theorem", "definition", "corollary", "lemma", "proposition", "remark", "example")
BOXES = ("admonition", "note", "tip", "warning", "important")
FOLDED = {  # what the book folds, by tag: the first lines of such a cell
    "check": "# @title Check\n# The book folds this cell; what it shows is proved or tested here.\n",
    "words": "# @title Numbers and words\n# The book folds this cell; the text shows what it computes.\n",
}


class Unknown(ValueError):
    """Markup that has no form in a notebook yet."""


@dataclass
class Block:
    """A piece of a chapter's source: a paragraph, or a directive with what stands in it."""

    kind: str  #: 'text', 'heading', 'label', 'fence', or a directive's name.
    body: str
    argument: str = ""
    options: dict = field(default_factory=dict)
    line: int = 0


def blocks(text: str, first: int = 1) -> Iterator[Block]:
    """The blocks of a MyST source, in order, without front matter."""
    lines, i = text.splitlines(), 0
    if lines[:1] == ["---"]:
        i = lines.index("---", 1) + 1
    while i < len(lines):
        line, at = lines[i], first + i
        if not line.strip():
            i += 1
        elif found := FENCE.match(line) or COLONS.match(line):
            marks, name, argument = found.groups()
            end = next((j for j in range(i + 1, len(lines)) if lines[j].rstrip() == marks), None)
            if end is None:
                raise Unknown(f"line {at}: {line!r} is never closed")
            if name is None:
                yield Block("fence", "\n".join(lines[i : end + 1]), line=at)
            else:
                options, body = _options(lines[i + 1 : end])
                yield Block(name, "\n".join(body), argument, options, at)
            i = end + 1
        elif found := LABEL.match(line):
            yield Block("label", found[1], line=at)
            i += 1
        elif HEADING.match(line):
            yield Block("heading", line, line=at)
            i += 1
        else:
            start = i
            while i < len(lines) and (lines[i].strip() or "\n".join(lines[start:i]).count("$$") % 2):
                if i > start and (FENCE.match(lines[i]) or COLONS.match(lines[i])):
                    break
                i += 1
            kind = "fence" if all(part.startswith("    ") for part in lines[start:i]) else "text"
            yield Block(kind, "\n".join(lines[start:i]), line=at)


def _options(body: list[str]) -> tuple[dict, list[str]]:
    if body[:1] == ["---"]:
        end = body.index("---", 1)
        return yaml.safe_load("\n".join(body[1:end])) or {}, body[end + 1 :]
    n = next((n for n, line in enumerate(body) if not re.match(r":[\w-]+:", line)), len(body))
    return yaml.safe_load("\n".join(line[1:] for line in body[:n])) or {}, body[n:]


@dataclass(frozen=True)
class Target:
    """Something that a reference leads to."""

    chapter: str
    number: str  #: '5.1'; '' for a section.
    kind: str  #: 'Theorem', 'Figure', 'Exercise', 'equation', 'section', 'chapter'.
    title: str = ""


@dataclass
class Book:
    """What the notebooks of all chapters share."""

    config: dict
    macros: dict[str, str]
    chapters: dict[str, str]  #: Name to title, in order.
    targets: dict[str, Target]
    citations: dict[str, tuple[str, str, str]]  #: Key to authors, year, entry.
    symbols: dict[tuple[str, str], str]  #: (chapter or '', key) to LaTeX, from the notation page.

    def colab(self, chapter: str) -> str:
        """Address that opens a chapter's notebook in Colab."""
        repository = self.config["repository"]
        path = repository["url"].removeprefix("https://github.com/")
        return f"https://colab.research.google.com/github/{path}/blob/{repository['branch']}/notebooks/{chapter}.ipynb"

    def page(self, name: str) -> str:
        """Address of a page that is no chapter: on the site when the configuration says where it is."""
        repository, base = self.config["repository"], self.config["sphinx"]["config"].get("html_baseurl")
        if base:
            return f"{base.rstrip('/')}/book/{name}.html"
        return f"{repository['url']}/blob/{repository['branch']}/book/{name}.md"


def read_book() -> Book:
    """Configuration, numbers of everything that can be referred to, and references."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    names = [Path(c["file"]).name for part in toc["parts"] if part.get("numbered") for c in part["chapters"]]
    chapters, targets = {}, {}
    for number, name in enumerate(names, start=1):
        counts: Counter[str] = Counter()
        for label, kind, title in _labelled((ROOT / f"book/{name}.md").read_text(encoding="utf-8")):
            counts[kind] += 1
            if kind == "chapter":
                chapters[name] = title
            counted = "" if kind == "section" else str(number) if kind == "chapter" else f"{number}.{counts[kind]}"
            if label:
                targets[label] = Target(name, counted, kind, title)
    macros = config["sphinx"]["config"]["book_macros"]
    return Book(config, macros, chapters, targets, _citations(), _symbols())


def _labelled(text: str) -> Iterator[tuple[str, str, str]]:
    """(label, kind, title) of what Sphinx numbers or refers to, in order; the label may be missing."""
    pending = ""
    for block in blocks(text):
        if block.kind == "label":
            pending = block.body
        elif block.kind == "heading":
            hashes, title = HEADING.match(block.body).groups()  # type: ignore[union-attr]
            yield pending, "chapter" if len(hashes) == 1 else "section", title
            pending = ""
        elif block.kind == "exercise-start":
            yield block.options["label"], "Exercise", block.argument
        elif block.kind == "code-cell":
            if figure := block.options.get("mystnb", {}).get("figure"):
                yield figure["name"], "Figure", ""
        elif block.kind.startswith("prf:") and (kind := block.kind[4:]) in PROVED:
            yield block.options.get("label", ""), kind.capitalize(), block.argument
            yield from _labelled(block.body)
        else:
            yield from ((m["label"], "equation", "") for m in INLINE.finditer(block.body) if m["label"])


def _symbols() -> dict[tuple[str, str], str]:
    found = {}
    for block in blocks((ROOT / "book/notation.md").read_text(encoding="utf-8")):
        if block.kind == "symbols":
            rows = re.findall(r"^\| ([\w-]+) \| \$([^$]+)\$", block.body, re.MULTILINE)
            found |= {(block.options.get("chapter", ""), key): latex for key, latex in rows}
    return found


def _citations() -> dict[str, tuple[str, str, str]]:
    found = {}
    for key, entry in parse_file(str(ROOT / "book/references.bib")).entries.items():
        people = [_plain(" ".join([*person.prelast_names, *person.last_names])) for person in entry.persons["author"]]
        names = people[0] if len(people) == 1 else " and ".join(people) if len(people) == 2 else f"{people[0]} et al."
        what = {name: _plain(value) for name, value in entry.fields.items()}
        where = what.get("journal") or what.get("booktitle") or what.get("publisher") or what.get("howpublished") or ""
        link = f"https://doi.org/{what['doi']}" if "doi" in what else what.get("url", "")
        told = [f"{', '.join(people)}: *{what['title']}*", where, what["year"], link]
        found[key] = (names, what["year"], ". ".join(filter(None, told)) + ".")
    return found


def _plain(text: str) -> str:
    """A BibTeX field without its TeX."""
    for accent, mark in (("'", "\u0301"), ("`", "\u0300"), ('"', "\u0308"), ("~", "\u0303"), ("v", "\u030c")):
        text = re.sub(rf"\{{?\\{re.escape(accent)}\s?\{{?\\?([A-Za-z])\}}?\}}?", rf"\1{mark}", text)
    return re.sub(r"[{}]", "", text.replace(r"\&", "&").replace("--", "–").replace("~", " "))


@cache
def _macro(name: str) -> re.Pattern:
    return re.compile(re.escape(name) + r"(?![A-Za-z])")


def expanded(latex: str, macros: dict[str, str]) -> str:
    """LaTeX with the book's macros written out."""
    for _ in range(5):
        before = latex
        for name, definition in macros.items():
            while found := _macro(name).search(latex):
                end, text = found.end(), definition
                for n in range(1, 1 + max([int(k) for k in re.findall(r"#(\d)", definition)], default=0)):
                    argument, end = _argument(latex, end)
                    text = text.replace(f"#{n}", argument)
                gap = " " if re.search(r"[A-Za-z]$", text) and latex[end : end + 1].isalpha() else ""
                latex = latex[: found.start()] + text + gap + latex[end:]
        if latex == before:
            return latex
    raise Unknown(f"macros that call each other in a circle, in {latex!r}")


def _argument(latex: str, start: int) -> tuple[str, int]:
    """The LaTeX argument that begins at or after `start`, and where it ends."""
    start += len(latex[start:]) - len(latex[start:].lstrip())
    if latex[start] != "{":
        return latex[start], start + 1
    depth = 0
    for end in range(start, len(latex)):
        depth += {"{": 1, "}": -1}.get(latex[end], 0)
        if depth == 0:
            return latex[start + 1 : end], end + 1
    raise Unknown(f"braces that do not close in {latex!r}")


class Notebook:
    """One chapter on its way into cells."""

    def __init__(self, book: Book, name: str, text: str):
        self.book, self.name, self.text = book, name, text
        self.cells: list[dict] = []
        self.cited: list[str] = []
        self.waiting: list[str] = []  # paragraphs not yet in a cell
        self.starters = starters(text)

    def make(self) -> dict:
        """The notebook as nbformat's dictionary."""
        for block in blocks(self.text):
            try:
                self.add(block)
            except Unknown as error:
                raise Unknown(f"book/{self.name}.md, line {block.line}: {error}") from error
        if self.cited:
            entries = "\n".join(f"* {self.book.citations[key][2]}" for key in sorted(self.cited))
            self.waiting += ["## References", entries]
        self.flush()
        for i, cell in enumerate(self.cells):
            cell["id"] = f"{self.name}-{i:03d}"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        about = {"kernelspec": kernel, "language_info": {"name": "python"}, "colab": {"name": f"{self.name}.ipynb"}}
        return {"cells": self.cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}

    def add(self, block: Block) -> None:
        """Put one block into the notebook."""
        kind, body = block.kind, block.body
        if kind in ("label", "exercise-end", "solution-end"):
            return
        if kind == "heading":
            self.flush()
            self.waiting.append(self.prose(body))
            if body.startswith("# "):
                self.opening()
        elif kind == "text":
            self.waiting.append(self.prose(body))
        elif kind == "fence":
            self.waiting.append(body)
        elif kind == "code-cell":
            self.code(block)
        elif kind in BOXES:
            title = block.argument or kind.capitalize()
            self.waiting.append(_quoted(f"**{self.prose(title)}**\n\n{self.nested(body)}"))
        elif kind == "prf:proof":
            self.waiting.append(_quoted(f"*Proof.* {self.nested(body)} ∎"))
        elif kind.startswith("prf:") and kind[4:] in PROVED:
            named = self.book.targets[block.options["label"]]
            heading = f"**{named.kind} {named.number}** ({self.prose(block.argument)})"
            self.waiting.append(_quoted(f"{heading}\n\n{self.nested(body)}"))
        elif kind == "exercise-start":
            self.flush()
            target = self.book.targets[block.options["label"]]
            self.label = block.options["label"]
            self.waiting.append(f"### Exercise {target.number}: {self.prose(block.argument)}")
        elif kind == "solution-start":
            if begun := self.starters.get(block.argument):
                self.waiting.append(f"Your start:\n\n```python\n{begun}\n```")
            self.flush()
            title = f"#### Solution of exercise {self.book.targets[block.argument].number}"
            self.markdown(title, {"heading_collapsed": True, "jp-MarkdownHeadingCollapsed": True})
        else:
            raise Unknown(f"the directive {{{kind}}} has no form in a notebook; add one to tools/make_notebooks.py")

    def opening(self) -> None:
        """What stands under the title: where this comes from, and the cell that sets everything up."""
        title, url = self.book.config["title"], self.book.config["repository"]["url"]
        self.waiting.append(
            f"A chapter of [*{title}*]({url}), generated from its source. "
            f"[Open it in Colab]({self.book.colab(self.name)}), run the first cell, then the others in order: numbers "
            "in the text appear when the cells that compute them have run. Cells that check a derivation or a claim "
            "are folded, and so are solutions and cells that only make the numbers and words of the text."
        )
        self.flush()
        self.source(SETUP.format(**self.book.config["repository"]).rstrip("\n"), {})

    def code(self, block: Block) -> None:
        """A code cell, and the caption of its figure."""
        self.flush()
        tags, shown = list(block.options.get("tags", [])), block.options.get("mystnb", {})
        about: dict = {"tags": tags} if tags else {}
        source = block.body.strip("\n")
        for tag in FOLDED.keys() & set(tags):
            source = FOLDED[tag] + source
            about |= {"cellView": "form", "jupyter": {"source_hidden": True}}
        if alt := shown.get("image", {}).get("alt"):
            about["alt"] = alt
        self.source(source, about)
        if figure := shown.get("figure"):
            number = self.book.targets[figure["name"]].number
            self.waiting.append(f"**Figure {number}.** {self.prose(figure['caption'])}")

    def nested(self, body: str) -> str:
        """The inside of a box: text, formulas and lists."""
        parts = []
        for block in blocks(body):
            if block.kind == "fence":
                parts.append(block.body)
            elif block.kind == "text":
                parts.append(self.prose(block.body, one_line=True))
            elif block.kind != "label":
                raise Unknown(f"{{{block.kind}}} inside a box")
        return "\n\n".join(parts)

    def prose(self, text: str, one_line: bool = False) -> str:
        """Plain Markdown; numbers that cells compute become `«name:format»`."""

        def put(found: re.Match) -> str:
            if found["role"]:
                return self.role(found["role"], found["target"])
            if found["comment"] is not None:
                return ""
            if found["display"]:
                latex = self.display(found["display"])
                number = rf" \tag{{{self.book.targets[found['label']].number}}}" if found["label"] else ""
                if one_line:  # a quoted formula of several lines would get the quotation's marks into it
                    return f"$${' '.join(latex.split())}{number}$$"
                return f"$$\n{latex}{number}\n$$"
            if found["inline"]:
                return f"${expanded(found['inline'], self.book.macros)}$"
            return str(found["code"])

        return INLINE.sub(put, text).strip()

    def display(self, latex: str) -> str:
        """A display formula; lines without an environment are set below each other, as Sphinx does."""
        latex = expanded(latex.strip(), self.book.macros)
        if r"\\" in latex and r"\begin{" not in latex:
            return rf"\begin{{aligned}}{latex}\end{{aligned}}"
        return latex

    def role(self, role: str, text: str) -> str:
        """A role as plain Markdown."""
        named = re.match(r"(?P<says>.+?)\s*<(?P<to>[^>]+)>$", text, re.DOTALL)
        says, to = (named["says"], named["to"]) if named else ("", text)
        if role == "glue:text":
            return f"«{text}»"
        if role == "eq":
            return self.link(to, f"({self.target(to).number})")
        if role in ("ref", "numref", "prf:ref"):
            target = self.target(to)
            if target.kind == "chapter":
                return self.link(to, says or f"chapter {target.number}, {target.title}")
            if target.kind == "section":
                return self.link(to, says or f"“{self.prose(target.title)}”")
            return self.link(to, says or f"{target.kind} {target.number}")
        if role.split(":")[0] == "cite":
            return self.cite(role, [key.strip() for key in text.split(",")])
        if role == "term":
            return says or to
        if role == "sym":
            latex = says or self.book.symbols.get((self.name, to)) or self.book.symbols.get(("", to))
            if latex is None:
                raise Unknown(f"{to!r} is not in the notation page's tables")
            return f"${expanded(latex, self.book.macros)}$"
        if role == "in-code":
            return f"*In code:* `{text.partition(':')[0]}`"
        if role == "doc":
            return f"[{says or to}]({self.page(to)})"
        if role.startswith("py:"):
            return f"`{says or to.lstrip('~')}`"
        raise Unknown(f"the role {{{role}}} has no form in a notebook; add one to tools/make_notebooks.py")

    def page(self, name: str) -> str:
        """Address of a page or chapter."""
        return self.book.colab(name) if name in self.book.chapters else self.book.page(name)

    def target(self, label: str) -> Target:
        """What a label stands for."""
        if label not in self.book.targets:
            raise Unknown(f"the label {label!r} is not in any chapter")
        return self.book.targets[label]

    def link(self, label: str, says: str) -> str:
        """Plain words within the chapter, a link to another chapter's notebook."""
        chapter = self.target(label).chapter
        if chapter == self.name:
            return says
        number = list(self.book.chapters).index(chapter) + 1
        where = "" if self.target(label).kind == "chapter" else f" of chapter {number}"
        return f"[{says}{where}]({self.book.colab(chapter)})"

    def cite(self, role: str, keys: list[str]) -> str:
        """Author and year; the entries stand at the end of the notebook."""
        for key in keys:
            if key not in self.book.citations:
                raise Unknown(f"{key!r} is not in book/references.bib")
        self.cited += [key for key in keys if key not in self.cited]
        if role == "cite:t":
            return " and ".join(f"{self.book.citations[key][0]} ({self.book.citations[key][1]})" for key in keys)
        return f"({'; '.join(f'{self.book.citations[key][0]} {self.book.citations[key][1]}' for key in keys)})"

    def flush(self) -> None:
        """Put the waiting paragraphs into cells: those with numbers into one that shows them."""
        group: list[str] = []
        for part in [*self.waiting, ""]:
            if part and (not group or ("«" in part) == ("«" in group[0])):
                group.append(part)
                continue
            if group:
                text = "\n\n".join(group)
                self.told(text) if "«" in text else self.markdown(text, {})
            group = [part] if part else []
        self.waiting = []

    def told(self, text: str) -> None:
        """A cell whose output is text with the numbers of this very run."""
        if '"""' in text or text.endswith("\\"):
            raise Unknown(f"text that does not fit into a raw string: {text[:60]!r}")
        source = f'# @title Text with numbers of this run\nsay(r"""\n{text}\n""")'
        self.source(source, {"cellView": "form", "jupyter": {"source_hidden": True}})

    def markdown(self, text: str, about: dict) -> None:
        """A text cell."""
        self.cells.append({"cell_type": "markdown", "metadata": about, "source": text.splitlines(keepends=True)})

    def source(self, code: str, about: dict) -> None:
        """A code cell that has not run."""
        lines = code.splitlines(keepends=True)
        self.cells.append(
            {"cell_type": "code", "execution_count": None, "metadata": about, "outputs": [], "source": lines}
        )


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


def notebooks() -> dict[Path, str]:
    """Path and text of every chapter's notebook."""
    book = read_book()
    found = {}
    for name in book.chapters:
        made = Notebook(book, name, (ROOT / f"book/{name}.md").read_text(encoding="utf-8")).make()
        found[FOLDER / f"{quote(name)}.ipynb"] = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    wanted = notebooks()
    for path in set(FOLDER.glob("*.ipynb")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        partial = path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    print(f"{len(wanted)} notebooks written to {FOLDER.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
