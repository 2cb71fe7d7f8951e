"""Starter code of an exercise, made from its solution, so that the two cannot drift apart.

A comment in the solution's code begins what the reader has to write; it says what that is:

    rate, mode = sp.symbols("rate mode", positive=True)
    # yours: the point where one step from x lands
    landed = x - rate * sp.diff(loss, x)
    identity("one step lands on the mode", landed.subs(rate, 1 / curvature), mode)

The part ends before the next statement beside it that calls `identity` or `claim`, which is what the reader's answer
has to pass, or at a comment `# given: ...`. In its place the starter has

    ...  # yours: the point where one step from x lands
    # sets: landed

with the names that the rest reads. `starter` and `starters` turn text into text; what follows them puts their result
on the page.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

from docutils import nodes
from sphinx.util import logging
from sphinx_exercise.nodes import exercise_enumerable_node, exercise_node

logger = logging.getLogger(__name__)
CHECKS = {"identity", "claim"}
BLOCKS = ("body", "orelse", "finalbody")
SOLUTION = re.compile(r"^(`{3,})\{solution-start\} (\S+)\n(.*?)^\1\{solution-end\}", re.MULTILINE | re.DOTALL)
CELL = re.compile(
    r"^(`{3,})\{code-cell\}[^\n]*\n(?:---\n.*?^---\n|(?::[^\n]*\n)*)(.*?)^\1\s*$", re.MULTILINE | re.DOTALL
)


class StarterError(ValueError):
    """A solution from which no starter can be made."""


def comments(code: str) -> dict[int, tuple[int, str, str]]:
    """Line -> (column, "yours" or "given", text) of each marker."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        marker = re.match(r"#\s*(yours|given)\b:?\s*(.*)", token.string) if token.type == tokenize.COMMENT else None
        if marker:
            line, column = token.start
            if token.line[:column].strip():
                raise StarterError(f"line {line}: `# {marker[1]}:` must stand on a line of its own")
            if marker[1] == "yours" and not marker[2]:
                raise StarterError(f"line {line}: `# yours:` must say what to compute")
            found[line] = (column, marker[1], marker[2].strip())
    return found


def blocks(tree: ast.AST):
    """All lists of statements that stand beside each other."""
    for node in ast.walk(tree):
        for name in BLOCKS:
            block = getattr(node, name, None)
            if isinstance(block, list) and block:
                yield block


def first_line(statement: ast.stmt) -> int:
    """Line on which a statement begins, its decorators included."""
    return min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", ()))])


def checks(statement: ast.stmt) -> bool:
    """Whether a statement calls one of the book's checks."""
    calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    return any(isinstance(called, ast.Name) and called.id in CHECKS for called in calls)


def owner(node: ast.expr) -> set[str]:
    """The name at the root of `name.attribute[index](...)`, if there is one."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def bound(statements: list[ast.stmt]) -> set[str]:
    """Names that statements assign, define, import or change in place; not those of comprehensions."""
    names, inner = set(), set()
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.comprehension):
            inner |= {id(name) for name in ast.walk(node.target)}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in inner:
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names |= owner(node)
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Call)
            and not isinstance(node.value.func, ast.Name)
        ):
            names |= owner(node.value)  # `scores.append(...)` changes what the method belongs to
    return names


def read_first(tree: ast.AST, kept: set[int]) -> set[str]:
    """Names that the lines `kept` read before they assign them, if they do; a comprehension's own names aside."""
    own, ends, first = set(), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            targets = {n.id for g in node.generators for n in ast.walk(g.target) if isinstance(n, ast.Name)}
            own |= {id(n) for n in ast.walk(node) if isinstance(n, ast.Name) and n.id in targets}
        if isinstance(node, ast.Assign):  # the right side is read before the left side is assigned
            ends |= {id(n): (node.end_lineno, node.end_col_offset) for t in node.targets for n in ast.walk(t)}
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.lineno in kept and id(n) not in own]
    for node in sorted(names, key=lambda node: ends.get(id(node), (node.lineno, node.col_offset))):
        first.setdefault(node.id, node)
    return {name for name, node in first.items() if isinstance(node.ctx, ast.Load)}


def comment_end(lines: list[str], line: int) -> int:
    """Last line of the comment that begins on `line`: what to compute may take more than one."""
    while line < len(lines) and re.match(r"\s*#(?!\s*(yours|given)\b)", lines[line]):
        line += 1
    return line


def part(tree: ast.Module, lines: list[str], markers: dict[int, tuple[int, str, str]], line: int) -> tuple[int, int]:
    """First and last line of the statements that the marker on `line` covers.

    They are those beside it, up to the first one that checks or that stands below another marker.
    """
    for block in blocks(tree):
        rest = [statement for statement in block if first_line(statement) > line]
        between = lines[line : first_line(rest[0]) - 1] if rest else []
        if rest and rest[0].col_offset == markers[line][0] and all(not re.match(r"\s*[^\s#]", b) for b in between):
            break
    else:
        raise StarterError(f"line {line}: no statement follows `# yours:` at its own indentation")
    last = line
    for statement in rest:
        stopped = any(last < other < first_line(statement) for other in markers if other != line)
        if stopped or checks(statement):
            if last == line:
                raise StarterError(f"line {line}: nothing stands between `# yours:` and what ends it")
            return first_line(rest[0]), last
        last = statement.end_lineno or last
    raise StarterError(
        f"line {line}: no check follows; `# yours:` must be followed, beside it, by a statement that calls "
        "identity(...) or claim(...), or by a comment `# given: what follows`"
    )


def starter(code: str) -> str | None:
    """The starter of a solution's cell, None for a cell without a marker.

    Raises:
        StarterError: if a marker covers nothing, if no check follows it, or if what remains does not need the answer.
    """
    markers = comments(code)
    if not any(kind == "yours" for _, kind, _ in markers.values()):
        if markers:
            raise StarterError(f"line {min(markers)}: `# given:` ends a part that `# yours:` has not begun")
        return None
    tree, lines = ast.parse(code), code.splitlines()
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    parts: dict[int, tuple[int, int]] = {}
    for line, (_, kind, _) in sorted(markers.items()):
        if any(first <= line <= last for first, last in parts.values()):
            raise StarterError(f"line {line}: a marker inside a part that has begun and not ended")
        if kind == "yours":
            parts[line] = part(tree, lines, markers, line)
        elif not any(last < line and not "".join(lines[last : line - 1]).strip() for _, last in parts.values()):
            raise StarterError(f"line {line}: `# given:` ends a part that `# yours:` has not begun")
    gone = {n for first, last in parts.values() for n in range(first, last + 1)}
    for line, (first, last) in parts.items():
        says = comment_end(lines, line)
        gone |= set(range(says + 1, first))
        answer = bound([node for node in statements if first <= first_line(node) <= last])
        needed = answer & read_first(tree, {n for n in range(last + 1, len(lines) + 1) if n not in gone})
        if not needed:
            raise StarterError(f"line {line}: what follows needs nothing of this part: no answer could be wrong")
        column, _, what = markers[line]
        lines[line - 1] = " " * column + f"...  # yours: {what}"
        lines[says - 1] += "\n" + " " * column + f"# sets: {', '.join(sorted(needed))}"
    if not any(checks(node) and first_line(node) > max(gone) for node in statements):
        raise StarterError("no check follows the last part; the reader's answer must have something to pass")
    return "\n".join(text for n, text in enumerate(lines, start=1) if n not in gone).strip("\n") + "\n"


def starters(source: str) -> dict[str, str]:
    """Label of each exercise -> its starter, from the MyST source of a chapter.

    Raises:
        StarterError: if a solution has no marked cell, or more than one.
    """
    found = {}
    for _, label, body in SOLUTION.findall(source):
        try:
            made = [text for _, code in CELL.findall(body) if (text := starter(code)) is not None]
        except StarterError as error:
            raise StarterError(f"{label}: {error}") from error
        if len(made) != 1:
            raise StarterError(
                f"{label}: {len(made)} cells of its solution have a comment `# yours: what to compute`; expected one"
            )
        found[label] = made[0]
    return found


def put_into_exercises(app, doctree) -> None:
    """At the end of each exercise of a page, its starter, folded."""
    exercises = [
        node
        for kind in (exercise_node, exercise_enumerable_node)
        for node in doctree.findall(kind)
        if not isinstance(node.parent, (exercise_node, exercise_enumerable_node))
    ]
    if not exercises:
        return
    try:
        made = starters(Path(app.env.doc2path(app.env.docname)).read_text(encoding="utf-8"))
    except StarterError as error:
        logger.warning("%s", error, location=app.env.docname, type="book", subtype="starter")
        return
    for exercise in exercises:
        code = made.get(exercise["label"])
        if code is None:
            logger.warning("the exercise %s has no solution", exercise["label"], location=exercise, type="book")
            continue
        block = nodes.literal_block(code, code, language="python", classes=["starter"])
        opens, closes = '<details class="starter"><summary>Starter code</summary>', "</details>"
        exercise.children[-1].extend([nodes.raw("", opens, format="html"), block, nodes.raw("", closes, format="html")])


def setup(app):
    """Run when sphinx-exercise has put the parts of an exercise together."""
    app.setup_extension("sphinx_exercise")
    app.connect("doctree-read", put_into_exercises)
    return {"parallel_read_safe": True}
