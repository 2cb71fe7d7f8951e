"""Every chapter follows the template, types no number that a cell could give, and calls only what is documented."""

import ast
import importlib
import re
import types

import pytest

import sources

PACKAGES = ("ewc_code", "ewc_experiments")
DOTTED = tuple(f"{package}." for package in PACKAGES)
WHOLE = ("ewc_plots", "ewc_checks")  # imported as they are
CHAPTERS = [name for name in sources.chapters() if (sources.ROOT / f"{name}.md").exists()]


@pytest.fixture(params=CHAPTERS, ids=lambda name: name.split("/")[-1])
def source(request) -> str:
    return (sources.ROOT / f"{request.param}.md").read_text(encoding="utf-8")


def test_contents_and_files_agree():
    listed = set(sources.pages())
    present = {f"book/{path.stem}" for path in (sources.ROOT / "book").glob("*.md")}
    assert listed == present


def test_boxes_open_the_chapter(source):
    objectives, predict = source.find(":class: objectives"), source.find(":class: predict")
    assert objectives > 0, "no Objectives box"
    assert predict > 0, "no Predict box"
    assert objectives < source.index("{code-cell}"), "the Objectives box comes before the first cell"
    assert objectives < source.index("\n## "), "the Objectives box comes before the first section"


def test_checks_stand_in_the_text(source):
    checks = [cell for cell in sources.cells(source) if "check" in cell.tags and not cell.in_solution]
    assert checks, "no check cell outside the solutions"
    empty = [cell.line for cell in checks if not re.search(r"\b(identity|claim)\(", cell.code)]
    assert not empty, f"cells tagged check that check nothing, at lines {empty}"
    silent = [cell.line for cell in sources.cells(source) if "words" in cell.tags and "glue(" not in cell.code]
    assert not silent, f"cells tagged words that give the text nothing, at lines {silent}"


def test_summary_and_exercises_close_the_chapter(source):
    headings = re.findall(r"^## (.+?)\s*$", source, re.MULTILINE)
    assert headings[-2:] == ["Summary", "Exercises"], f"the last two sections are {headings[-2:]}"


def test_every_exercise_has_an_executed_solution(source):
    exercises = re.findall(r"^`{3,}\{exercise-start\}.*?\n:label: (\S+)", source, re.MULTILINE | re.DOTALL)
    assert len(exercises) >= 4, f"{len(exercises)} exercises"
    assert not re.search(r"^`{3,}\{(exercise|solution)\}", source, re.MULTILINE), "use the -start and -end forms"
    pattern = r"^`{3,}\{solution-start\} (\S+)\n(.*?)^`{3,}\{solution-end\}"
    solutions = dict(re.findall(pattern, source, re.MULTILINE | re.DOTALL))
    assert set(solutions) == set(exercises)
    for label, body in solutions.items():
        assert ":class: dropdown" in body, f"the solution of {label} is not folded"
        assert "{code-cell}" in body, f"the solution of {label} executes nothing"
        assert re.search(r"\b(identity|claim)\(", body), f"the solution of {label} checks nothing"


def test_no_number_is_typed_into_prose(source):
    typed = [
        found.group() for part in sources.prose(source) for found in re.finditer(r"(?<![\w.])\d+(\.\d+|\s?%)", part)
    ]
    assert not typed, f"glue these, or cite the paper that they are quoted from: {typed}"


def test_helpers_live_in_the_package(source):
    nodes = [(cell, ast.walk(ast.parse(cell.code))) for cell in sources.cells(source) if not cell.in_solution]
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    defined = [(cell.line, node.name) for cell, walk in nodes for node in walk if isinstance(node, kinds)]
    assert not defined, f"move these to the package, with a test: {defined}"


def test_what_is_called_is_documented(source):
    api = (sources.ROOT / "book/api.md").read_text(encoding="utf-8")
    modules, used = {}, set()
    for cell in sources.cells(source):
        for node in ast.walk(ast.parse(cell.code)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "ewc_code"]
                assert not names, f"write `from ewc_code import ...`, not import {names}"
                modules |= {alias.asname: alias.name for alias in node.names if alias.name == "ewc_plots"}
            if isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
                modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                (*DOTTED, "ewc_plots", "ewc_checks")
            ):
                used |= {(node.module, alias.name) for alias in node.names}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                used.add((modules[node.value.id], node.attr))
    for module, name in sorted(used):
        if isinstance(getattr(importlib.import_module(module), name), types.ModuleType):
            continue  # from ewc_plots import densities: what is called of it is in the page under its package
        assert f"automodule:: {module}\n" in api, f"{module} is not in the API page"
        home = importlib.import_module(module)
        found = getattr(home, name)
        assert not name.startswith("_"), f"{module}.{name} is private"
        if callable(found):
            assert found.__doc__, f"{module}.{name} has no docstring"
            listed = name in getattr(home, "__all__", ()) or found.__module__.startswith(home.__name__)
            assert listed, f"{name} is documented in {found.__module__}: import it from there"


def test_the_package_can_be_read_whole():
    files = (sources.ROOT / "ewc_code").rglob("*.py")
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) < 3500


def test_every_module_is_in_the_api_page():
    api = (sources.ROOT / "book/api.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        modules = {path.stem for path in (sources.ROOT / package).glob("[a-z]*.py")}
        modules |= {path.parent.name for path in (sources.ROOT / package).glob("[a-z]*/__init__.py")}
        assert modules == set(re.findall(rf"automodule:: {package}\.(\w+)\n", api)), package


def test_prose_keeps_what_it_must_judge():
    text = (
        "We saw 97.3 of them, $x = 0.5$, `0.25` and {glue:text}`a:.2f`.\n\nThey got 12.5 {cite:p}`a`.\n\n$$\n1.5\n$$\n"
    )
    assert re.findall(r"\d+\.\d+", " ".join(sources.prose(text))) == ["97.3"]
