"""From a formula to the line of code that computes it, and back.

In a chapter, on a line of its own right after a numbered formula:

    {in-code}`ewc_code.laplace.laplace: prior.moved(mode, {name: n * value`

names a function of the package and a piece of the line that is meant. The page gets a note beside the formula (in the
margin where there is one, else below it) that links to the API page and to that line in the repository, whose number is
looked up while the book is built; a piece that is not in the function any more is a warning, and so ends the build.
Where the line stands in a helper that the function calls, `ewc_code.fisher.full, in _vectors: ...` says so. The
function's entry in the API page gets links to all formulas that name it. Chapters that docstrings name in quotes become
links, too.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What the docstrings call the chapters; "Many tasks" and others will follow when they are written.
CHAPTERS = {
    "Forgetting": "forgetting",
    "Bayes": "bayes",
    "Laplace": "laplace",
    "Fisher information": "fisher",
    "EWC": "ewc",
    "The paper, reproduced": "paper",
    "Fisher in the wild": "wild",
    "Many tasks": "many",
    "Beyond the diagonal": "beyond",
    "Where it fails": "fails",
    "Your own model": "own",
    "Scale": "scale",
}


class in_code(nodes.Inline, nodes.Element):
    """A role that was read and not yet put beside its formula."""


@dataclass(frozen=True)
class Formula:
    """Where a formula stands that a function computes."""

    docname: str
    equation: str
    section: str


def locate(root: Path, name: str, piece: str) -> tuple[str, int, str]:
    """File below `root`, number and text of the first line that holds `piece` in an object.

    `name` is the object's, or "object, in helper" for a line of a function that it calls, directly or not.

    Raises:
        ValueError: there is no such module, object or line.
    """
    name, _, helper = name.partition(", in ")
    parts = name.split(".")
    paths = [root.joinpath(*parts[:length]).with_suffix(".py") for length in range(len(parts) - 1, 0, -1)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"{name!r} must be module.object in a package of this book; found no such module")
    source = path.read_text(encoding="utf-8")
    module = ast.parse(source)
    found = inside(module, parts[len(path.relative_to(root).parts) :])
    if found is None:
        raise ValueError(f"{path.relative_to(root)} has no {name}")
    if helper:
        called, new = set(), {found}
        while new:
            names = {n.id for function in new for n in ast.walk(function) if isinstance(n, ast.Name)} - called
            called |= names
            new = {function for n in names if (function := inside(module, [n])) is not None}
        found = inside(module, [helper]) if helper in called else None
        if found is None:
            raise ValueError(f"{name} calls no {helper} of its own module")
    lines = source.splitlines()
    begins = found.body[ast.get_docstring(found) is not None].lineno
    for number in range(begins, (found.end_lineno or 0) + 1):
        if piece in lines[number - 1]:
            return path.relative_to(root).as_posix(), number, lines[number - 1].strip()
    raise ValueError(f"no line of {helper or name} has {piece!r} in it, outside its docstring")


def inside(module: ast.AST, names: list[str]):
    """The class or function at the end of a path of names, None if there is none."""
    for name in names:
        module = next((node for node in ast.iter_child_nodes(module) if getattr(node, "name", None) == name), None)
        if module is None:
            return None
    return module


def role(name, rawtext, text, lineno, inliner, options=None, content=None):
    """Read ``{in-code}`object: piece of its line` ``."""
    target, colon, piece = (part.strip() for part in text.partition(": "))
    if not (colon and piece):
        message = f"in-code must be `package.module.object: piece of its line`; got `{text}`"
        problem = inliner.reporter.error(message, line=lineno)
        return [inliner.problematic(rawtext, rawtext, problem)], [problem]
    return [in_code("", target=target, piece=piece)], []


def reference(domain: str, kind: str, target: str, docname: str, child: nodes.Node) -> addnodes.pending_xref:
    """A link that Sphinx resolves, and warns of when it cannot."""
    options = {"refdomain": domain, "reftype": kind, "reftarget": target, "refdoc": docname}
    return addnodes.pending_xref("", child, refexplicit=domain == "std", refwarn=True, **options)


def put_beside_formulas(app, doctree) -> None:
    """Make a note of each role, and remember the formula that it belongs to."""
    env, theme = app.env, app.config.html_theme_options
    known = env.book_formulas.setdefault(env.docname, [])
    for node in list(doctree.findall(in_code)):
        paragraph, target, piece = node.parent, node["target"], node["piece"]
        here = paragraph.parent.index(paragraph) - 1
        # A formula may have several notes, which share one place. The theme folds the page's contents while a "popout"
        # is in view.
        place = paragraph.parent[here] if here >= 0 else None
        if isinstance(place, nodes.compound) and "beside" in place["classes"]:
            here -= 1
        else:
            place = nodes.compound(classes=["beside", "popout"])
        before = paragraph.parent[here] if here >= 0 else None
        if len(paragraph) > 1 or not isinstance(before, nodes.math_block) or not before.get("label"):
            logger.warning("in-code must stand alone after a numbered formula: %s", target, location=node, type="book")
            node.replace_self(nodes.literal(text=target))
            continue
        try:
            path, line, text = locate(Path(app.srcdir), target, piece)
        except ValueError as error:
            logger.warning("%s", error, location=node, type="book", subtype="in-code")
            node.replace_self(nodes.literal(text=target))
            continue
        target, section = target.partition(",")[0], paragraph
        while not isinstance(section, nodes.section) or not isinstance(section[0], nodes.title):
            section = section.parent  # boxes of theorems have sections, too, but without a title
        known.append((target, Formula(env.docname, before["label"], section[0].astext())))
        short = target.removeprefix("ewc_code.").removeprefix("ewc_experiments.")
        address = f"{theme['repository_url']}/blob/{theme.get('repository_branch', 'main')}/{path}#L{line}"
        note = nodes.paragraph("", "In code: ", classes=["in-code"])
        note += reference("py", "obj", target, env.docname, nodes.literal(text=short))
        note += nodes.Text(", ")
        note += nodes.reference("", f"line\u00a0{line}", refuri=address, reftitle=text, internal=False)
        if place.parent is None:
            paragraph.replace_self(place)
        else:
            paragraph.parent.remove(paragraph)
        place += note


def link_chapters(app, what, name, obj, options, lines: list[str]) -> None:
    """Make links of the chapters that a docstring names in quotes."""
    there = {title: doc for title, doc in CHAPTERS.items() if f"book/{doc}" in app.env.found_docs}
    pattern = re.compile("|".join(f'"{re.escape(title)}"' for title in there) or r"(?!)")
    # A title may be broken over two lines, where a link may not: it goes to the first of them.
    for i, line in enumerate(lines):
        lines[i] = pattern.sub(lambda found: f":doc:`{found[0][1:-1]} </book/{there[found[0][1:-1]]}>`", line)


class Back(SphinxPostTransform):
    """Below each entry of the API page, the formulas of the chapters that it computes."""

    default_priority = 5  # before references are resolved

    def run(self, **kwargs):
        """Append a line to the entries that any chapter names."""
        formulas: dict[str, list[Formula]] = {}
        for known in self.env.book_formulas.values():
            for target, formula in known:
                formulas.setdefault(target, []).append(formula)
        for entry in self.document.findall(addnodes.desc):
            name = next(iter(entry.next_node(addnodes.desc_signature).get("ids", ())), "")
            if name not in formulas:
                continue
            line = nodes.paragraph("", "Derived in the book: ", classes=["in-book"])
            section = None
            for formula in dict.fromkeys(formulas[name]):  # several lines of a function may belong to one formula
                if formula.section != section:
                    line += nodes.Text(f"{'; ' if section else ''}{formula.section}")
                    section = formula.section
                line += nodes.Text(", ")
                line += reference("math", "eq", formula.equation, self.env.docname, nodes.Text(formula.equation))
            entry[-1].append(line)


def begin(app, env, docnames) -> None:
    """Every build reads all pages."""
    env.book_formulas = {}


def setup(app):
    """Run after `book_api` has escaped the docstrings, before napoleon reads their sections."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_node(in_code)
    app.add_role("in-code", role)
    app.connect("env-before-read-docs", begin)
    app.connect("doctree-read", put_beside_formulas)
    app.connect("autodoc-process-docstring", link_chapters, priority=200)
    app.add_post_transform(Back)
    return {"parallel_read_safe": False}
