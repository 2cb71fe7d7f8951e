"""The textbook's apparatus: starters that follow from solutions, and their planted faults."""

import ast

import pytest

import sources

CHAPTERS = [name.split("/")[-1] for name in sources.chapters()]


def text_of(name: str) -> str:
    return (sources.ROOT / f"book/{name}.md").read_text(encoding="utf-8")


@pytest.fixture
def exercises(monkeypatch):
    monkeypatch.syspath_prepend(str(sources.ROOT / "book/_ext"))
    return pytest.importorskip("book_exercises")


SOLVED = """x = sp.Symbol("x")
# yours: the derivative of the square,
# without a limit
slope = 2 * x
# given: the same by computer algebra
other = sp.diff(x**2, x)
identity("slope", other, slope)
for k in (2, 3):
    # yours: the derivative of x to the power k
    values = []
    values.append(k * x ** (k - 1))
    claim(f"power {k}", values == [sp.diff(x**k, x)], {"k": k})
"""

STARTER = """x = sp.Symbol("x")
...  # yours: the derivative of the square,
# without a limit
# sets: slope
# given: the same by computer algebra
other = sp.diff(x**2, x)
identity("slope", other, slope)
for k in (2, 3):
    ...  # yours: the derivative of x to the power k
    # sets: values
    claim(f"power {k}", values == [sp.diff(x**k, x)], {"k": k})
"""


def test_a_starter_is_its_solution_without_the_answer(exercises):
    assert exercises.starter(SOLVED) == STARTER
    assert exercises.starter("x = 1\nclaim('one', x == 1, {'x': x})\n") is None
    assert exercises.starter('text = "# yours: not a comment"\nclaim("one", True, {"x": 1})\n') is None


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("# yours: a\na = 1\nprint(a)\n", "no check follows"),
        ("# yours: a\nclaim('a', a == 1, {'a': a})\na = 1\n", "nothing stands between"),
        ("a = 1\nclaim('a', a == 1, {'a': a})\n# yours: a\n", "no statement follows"),
        ("# yours:\na = 1\nclaim('a', a == 1, {'a': a})\n", "must say what to compute"),
        ("a = 1  # yours: a\nclaim('a', a == 1, {'a': a})\n", "a line of its own"),
        ("# yours: a\na = 1\n# given: b\nb = 2\nprint(a, b)\n", "no check follows the last part"),
        ("a = 1\n# given: b\nclaim('a', a == 1, {'a': a})\n", "has not begun"),
        ("# yours: a\na = 1\nb = 2\nclaim('c', True, {'c': 1})\n", "needs nothing of this part"),
        ("# yours: a\na = 1\na = 2\n# given: a\na = 3\nclaim('a', a == 3, {'a': a})\n", "needs nothing of this part"),
        ("for k in (1, 2):\n    # yours: a\n    a = k\nclaim('a', a == 2, {'a': a})\n", "no check follows"),
        ("# yours: a\nif True:\n    # yours: b\n    a = 1\nclaim('a', a == 1, {'a': a})\n", "begun and not ended"),
        ("for k in (1,):\n    b = k\n    # yours: a\na = 1\nclaim('a', a == 1, {'a': a})\n", "no statement follows"),
    ],
)
def test_a_marker_in_the_wrong_place_is_refused(exercises, code, says):
    with pytest.raises(exercises.StarterError, match=says):
        exercises.starter(code)


@pytest.mark.parametrize("cells", [0, 2])
def test_a_solution_has_one_marked_cell(exercises, cells):
    cell = "```{code-cell}\n:tags: [x]\n# yours: a\na = 1\nclaim('a', a == 1, {'a': a})\n```\n"
    text = f"```{{solution-start}} ex-a\n:class: dropdown\n```\n{cells * cell}```{{solution-end}}\n```\n"
    with pytest.raises(exercises.StarterError, match=f"ex-a: {cells} cells"):
        exercises.starters(text)
    assert list(exercises.starters(text.replace(cells * cell, cell) if cells else text[:0])) == ["ex-a"] * bool(cells)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_exercise_has_a_starter_that_its_solution_completes(exercises, name):
    text = text_of(name)
    starters = exercises.starters(text)
    assert set(starters) == {label for _, label, _ in exercises.SOLUTION.findall(text)}
    for label, code in starters.items():
        ast.parse(code)
        body = next(body for _, found, body in exercises.SOLUTION.findall(text) if found == label)
        solution = next(cell for _, cell in exercises.CELL.findall(body) if "# yours:" in cell).splitlines()
        kept = [line.replace("...  # yours:", "# yours:") for line in code.splitlines() if "# sets:" not in line]
        rest = iter(solution)
        assert all(line in rest for line in kept), f"{label}: the starter is not the solution with parts left out"
        omitted = len("".join(solution)) - len("".join(kept))
        assert omitted > 0, label


@pytest.mark.parametrize("name", CHAPTERS)
def test_exercises_say_how_much_effort_they_take(name):
    titles = [line for line in text_of(name).splitlines() if "{exercise-start}" in line]
    assert len(titles) >= 4
    grades = [line.rpartition(" · effort: ")[2] for line in titles]
    assert set(grades) <= {"low", "medium", "high"}, titles
    assert len(set(grades)) > 1, "all exercises take the same effort"
