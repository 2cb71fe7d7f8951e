"""The textbook's apparatus: starters made from solutions, words and symbols that link, formulas that lead to code."""

import ast
import functools
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup

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


def blanked(pattern: str, text: str, flags: int = 0) -> str:
    """`text` with what matches replaced by spaces, so that places and lines stay."""
    return re.sub(pattern, lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=flags)


def running_text(name: str, exercises: bool = True) -> str:
    """A chapter without front matter, cells, displayed formulas, headings, code, and the arguments of directives."""
    text = text_of(name)
    text = text if exercises else text[: text.index("\n## Exercises")]
    text = blanked(r"\A---\n.*?\n---\n", text, re.DOTALL)
    text = blanked(r"^(`{3,})\{code-cell\}.*?^\1\s*$", text, re.DOTALL | re.MULTILINE)
    text = blanked(r"\$\$.*?\$\$", text, re.DOTALL)
    text = blanked(r"^    .*$|^#.*$|^[`:]{3,}.*$|^:\w+:.*$|\$\$ \(eq[^\n]*$", text, re.MULTILINE)
    return blanked(r"<!--.*?-->|\]\([^)]*\)", text, re.DOTALL)


# Words of the glossary that a chapter uses in another sense only.
ORDINARY = {
    ("forgetting", "overlap"),  # images overlap
    ("bayes", "overlap"),  # tasks may overlap
    ("bayes", "calibrated"),  # an instrument
    ("bayes", "stack"),  # to stack matrices
    ("wild", "mode"),  # training mode
    ("ewc", "evidence"),  # is no evidence of
}


def glossary() -> list[list[str]]:
    """The terms of each entry; those of one entry mean the same."""
    body = text_of("glossary").partition("```{glossary}\n:sorted:\n\n")[2].partition("\n```")[0]
    return [block.split("\n  ")[0].splitlines() for block in body.split("\n\n")]


def uses(term: str, text: str) -> list[re.Match]:
    """Where a term stands, in singular or plural; capitals count only where the term has them."""
    word = re.escape(term).replace(r"\ ", r"\s")
    word = f"{word[:-1]}(?:y|ies)" if term.endswith("y") else f"{word}(?:e?s)?"
    flags = re.IGNORECASE if term[0].islower() else 0
    return list(re.finditer(rf"(?<!double )(?<!training )(?<![\w-]){word}(?![\w-])", text, flags))


def linked_terms(text: str) -> list[tuple[int, int, str]]:
    """Start, end and target of each term role."""
    found = []
    for role in re.finditer(r"\{term\}`([^`<]+?)(?:\s*<([^>]+)>)?`", text):
        found.append((role.start(), role.end(), " ".join((role[2] or role[1]).split()).lower()))
    return found


def test_the_glossary_is_in_order_and_says_something():
    entries = glossary()
    assert len(entries) > 40
    for terms in entries:
        assert all(re.fullmatch(r"[\w' -]+", term) for term in terms), terms
    names = [term.lower() for terms in entries for term in terms]
    assert len(names) == len(set(names))
    assert [terms[0].lower() for terms in entries] == sorted(terms[0].lower() for terms in entries)


@pytest.mark.parametrize("name", CHAPTERS)
def test_the_first_use_of_a_term_links_to_the_glossary(name):
    text = running_text(name)
    roles = linked_terms(text)
    plain = blanked(r"\{[\w:.-]+\}`[^`]*`|`[^`]*`|\$[^$]*\$", text, re.DOTALL)
    missing = []
    for terms in glossary():
        links = [start for start, _, target in roles if target in [term.lower() for term in terms]]
        found = [match for term in terms for match in uses(term, plain)]
        first = min(found, key=lambda match: match.start(), default=None)
        if first and (name, terms[0]) not in ORDINARY and not (links and links[0] < first.start()):
            missing.append((text[: first.start()].count("\n") + 1, first[0]))
    assert not missing, f"link these with {{term}}: {missing}"


def test_every_term_is_used_by_a_chapter():
    linked = {target for name in CHAPTERS for _, _, target in linked_terms(text_of(name))}
    unused = [terms[0] for terms in glossary() if not linked & {term.lower() for term in terms}]
    assert not unused


def test_exceptions_are_needed():
    entries = {terms[0]: terms for terms in glossary()}
    for name, term in ORDINARY:
        assert any(uses(word, running_text(name)) for word in entries[term]), (name, term)


SYMBOL = re.compile(
    r"(?:\\(?:hat|bar|tilde)\s*)?\{?(\\[A-Za-z]+|[A-Za-z])\}?((?:[_^](?:\{[^{}]*\}|\\?[A-Za-z0-9]+|\*))*)"
)
COUNTING = set("ijklmnct")  # the notation page says so in a sentence


def normal(formula: str) -> str:
    """A formula with one way to write each thing."""
    return " ".join(formula.split()).replace(r"\mathcal D", r"\Data")


def symbol_table() -> dict[tuple[str, str], list[str]]:
    """(chapter or nothing, key) -> the formulas of a row."""
    rows = {}
    for options, body in re.findall(r"^```\{symbols\}\n((?::[^\n]*\n)*)(.*?)^```$", text_of("notation"), re.M | re.S):
        chapter = options.partition(":chapter: ")[2].strip()
        for line in body.strip().splitlines()[2:]:
            key, forms = (cell.strip() for cell in line.split("|")[1:3])
            assert (chapter, key) not in rows, f"two rows {key}"
            rows[chapter, key] = [normal(form) for form in re.findall(r"\$([^$]+)\$", forms)]
    return rows


def row_of(formula: str, chapter: str, rows) -> tuple[str, str] | None:
    """The row that an inline formula of one symbol belongs to: the chapter's own first, an exact form first."""
    formula = normal(formula)
    base, scripts = SYMBOL.match(formula).groups()
    scopes = [{key: forms for (scope, key), forms in rows.items() if scope == where} for where in (chapter, "")]
    starred = base + "^*"
    for fits in (
        lambda forms: formula in forms,
        lambda forms: "^*" in scripts and any(form.startswith(starred) for form in forms),
        lambda forms: base in forms,
        lambda forms: base in [found[1] for form in forms if (found := SYMBOL.match(form))],
    ):
        for where, own in zip((chapter, ""), scopes, strict=True):
            if found := [key for key, forms in own.items() if fits(forms)]:
                return where, found[0]
    return None


def single_symbols(text: str):
    """Start, end and formula of inline formulas that are one symbol, whatever its indices."""
    for found in re.finditer(r"(?<![\\$`])\$([^$`]+)\$", text):
        whole = SYMBOL.fullmatch(normal(found[1]))
        power = whole and re.sub(r"\^(\*|\{?\*\}?)", "", whole[2])
        if whole and ("^" not in power or normal(found[1]) == r"\sigma^2"):
            yield found.start(), found.end(), found[1], whole[1]


def sym_roles(text: str) -> list[tuple[int, str]]:
    """Start and key of each symbol role."""
    return [(role.start(), role[1] or role[2]) for role in re.finditer(r"\{sym\}`(?:[^`]*<([\w-]+)>|([^`]+))`", text)]


def first_uses(name: str) -> tuple[list, list]:
    """First uses of a symbol without a link, and symbols that no row explains."""
    text, rows = running_text(name, exercises=False), symbol_table()
    operators = set(re.findall(r"\$(\\[A-Za-z]+)", text_of("notation").partition("## Distributions and operators")[2]))
    links: dict[str, int] = {}
    for start, key in sym_roles(text):
        links.setdefault(key, start)
    unlinked, unknown = {}, []
    for start, end, formula, base in single_symbols(text):
        row = row_of(formula, name, rows)
        if row is None:
            if base not in COUNTING and base not in operators:
                unknown.append((text[:start].count("\n") + 1, formula))
        elif links.get(row[1], len(text)) > start:
            unlinked.setdefault(row, (start, end, formula))
    return list(unlinked.items()), unknown


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_symbol_is_in_the_table_and_its_first_use_links_there(name):
    unlinked, unknown = first_uses(name)
    text, rows = text_of(name), symbol_table()
    assert not unknown, f"no row of the notation page explains (line, symbol) {unknown}"
    places = [(text[:start].count("\n") + 1, formula, f"{{sym}}`{key}`") for (_, key), (start, _, formula) in unlinked]
    assert not places, f"link the first use: {places}"
    stray = [key for _, key in sym_roles(text) if (name, key) not in rows and ("", key) not in rows]
    assert not stray, f"no such rows: {stray}"


def test_every_row_of_a_chapter_is_used_there():
    for chapter, key in symbol_table():
        if chapter:
            assert key in [found for _, found in sym_roles(text_of(chapter))], (chapter, key)


BOX = re.compile(r"^[`:]{3,}\{prf:(\w+)\}[^\n]*\n(?::label: (\S+)\n)?", re.MULTILINE)


@pytest.mark.parametrize("name", CHAPTERS)
def test_theorems_and_definitions_are_numbered_proved_and_used(name):
    boxes = [found.groups() for found in BOX.finditer(text_of(name)) if found[1] != "ref"]
    kinds = [kind for kind, _ in boxes]
    unlabelled = [kind for kind, label in boxes if kind != "proof" and not label]
    assert not unlabelled, f"boxes without a label: {unlabelled}"
    assert kinds.count("proof") >= kinds.count("theorem"), "a theorem without a proof"
    assert "theorem" in kinds or "definition" in kinds
    book = "".join(path.read_text(encoding="utf-8") for path in (sources.ROOT / "book").glob("*.md"))
    used = re.findall(r"\{prf:ref\}`(?:[^`<]*<)?([\w-]+)>?`", book)
    assert not [label for _, label in boxes if label and label not in used], "nothing refers to these"


@pytest.mark.parametrize("name", CHAPTERS)
def test_predictions_are_answered_by_computed_numbers(name):
    text = text_of(name)
    boxes = list(
        re.finditer(r"^:{3,}\{admonition\}[^\n]*\n:class: predict\n(.*?)^:{3,}$", text, re.DOTALL | re.MULTILINE)
    )
    assert boxes
    for box in boxes:
        after = text[box.end() :]
        answers = [re.split(r"^## |:class: predict", after, flags=re.MULTILINE)[0].strip() or after]
        # a box may stand right before a section, or name the sections that answer it
        if not re.sub(r"^\([\w-]+\)=$", "", answers[0], flags=re.MULTILINE).strip():
            answers = [after.partition("\n## ")[2].partition("\n## ")[0]]
        answers += [
            text.partition(f"\n({label})=\n## ")[2].partition("\n## ")[0]
            for label in re.findall(r"\{ref\}`(sec-[\w-]+)`", box[1])
        ]
        line = text[: box.start()].count("\n") + 1
        assert all(
            "{glue:text}" in blanked(r"`{3,}\{code-cell\}.*?^`{3,}$", answer, re.DOTALL | re.MULTILINE)
            for answer in answers
        ), f"the box at line {line} is not answered by a number"


IN_CODE = re.compile(r"^\{in-code\}`(.*?): (.*)`$", re.MULTILINE)


@pytest.fixture
def links(monkeypatch):
    monkeypatch.syspath_prepend(str(sources.ROOT / "book/_ext"))
    return pytest.importorskip("book_links")


@pytest.mark.parametrize("name", CHAPTERS)
def test_notes_beside_formulas_name_lines_that_exist(links, name):
    text, found = text_of(name), IN_CODE.findall(text_of(name))
    assert found, "no formula of this chapter leads to the code"
    assert len(found) == text.count("{in-code}"), "in-code stands on a line of its own, as `object: piece of its line`"
    for target, piece in found:
        path, number, line = links.locate(sources.ROOT, target, piece)
        assert piece in (sources.ROOT / path).read_text(encoding="utf-8").splitlines()[number - 1]
        assert piece in line


@pytest.mark.parametrize(
    ("target", "piece", "says"),
    [
        ("ewc_code.laplace.laplace", "no such line", "no line of"),
        ("ewc_code.laplace.laplace", "Belief after a task", "outside its docstring"),
        ("ewc_code.laplace.nothing", "len(data)", "has no"),
        ("ewc_code.nothing.laplace", "len(data)", "no such module"),
        ("ewc_code.laplace.laplace, in next_term", "quartic", "calls no next_term"),
        ("ewc_code.gaussian.Full.log_det", "self.precision + information", "no line of"),
    ],
)
def test_a_note_about_nothing_is_refused(links, target, piece, says):
    with pytest.raises(ValueError, match=says):
        links.locate(sources.ROOT, target, piece)


def test_chapters_that_docstrings_name_exist(links):
    known = {name.split("/")[-1] for name in sources.chapters()}
    assert set(links.CHAPTERS.values()) == known
    named = set()
    for path in sources.ROOT.glob("ewc_*/*.py"):
        for found in re.findall(r"[Cc]hapters?\s+((?:\"[^\"]+\"[^.\"]*)+)", path.read_text(encoding="utf-8")):
            named |= {" ".join(title.split()) for title in re.findall(r"\"([^\"]+)\"", found)}
    assert named <= set(links.CHAPTERS), "add these to book_links"


SITE = Path(os.environ.get("EWC_SITE", sources.ROOT / "_build/html")) / "book"


@functools.cache
def page(name: str) -> BeautifulSoup:
    return BeautifulSoup((SITE / f"{name}.html").read_text(encoding="utf-8"), "html.parser")


@pytest.mark.site
@pytest.mark.parametrize("name", CHAPTERS)
def test_pages_show_the_starters(exercises, name):
    shown = [block.select_one("pre").get_text() for block in page(name).select("details.starter")]
    assert shown == list(exercises.starters(text_of(name)).values())
    assert all(block.find_parent(class_="exercise") for block in page(name).select("details.starter"))


@pytest.mark.site
@pytest.mark.parametrize("name", CHAPTERS)
def test_notes_lead_to_the_line_and_to_the_api_page(links, name):
    address = yaml.safe_load((sources.ROOT / "_config.yml").read_text())["repository"]
    notes = page(name).select("p.in-code")
    assert len(notes) == len(IN_CODE.findall(text_of(name)))
    for note, (target, piece) in zip(notes, IN_CODE.findall(text_of(name)), strict=True):
        entry, line = (link["href"] for link in note.select("a"))
        path, number, _ = links.locate(sources.ROOT, target, piece)
        assert line == f"{address['url']}/blob/{address['branch']}/{path}#L{number}"
        anchor = target.partition(",")[0]
        assert entry == f"api.html#{anchor}"
        back = page("api").find(id=anchor).find_parent("dl").select("p.in-book a")
        assert any(link["href"].startswith(f"{name}.html#equation-") for link in back), f"{anchor} does not lead back"


@pytest.mark.site
@pytest.mark.parametrize("name", CHAPTERS)
def test_what_is_linked_is_explained_on_the_page(name):
    article = page(name).select_one("article")
    targets = {link["href"].split("#")[1] for link in article.select("a[href*='#term-'], a.sym")}
    templates = {template["id"]: template.get_text(strip=True) for template in article.select("template[id^=about-]")}
    assert set(templates) == {f"about-{target}" for target in targets}
    assert all(len(text) > 2 for text in templates.values())


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on PATH: the browser tests did not run")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.site
def test_a_definition_appears_for_mouse_keyboard_and_touch_and_escape_closes_it(browser):
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto((SITE / "ewc.html").as_uri(), wait_until="networkidle")
    requests = []
    tab.on("request", lambda request: requests.append(request.url))
    link, tip = tab.locator("article a[href*='#term-predictive']").first, tab.locator("#ewc-definition")
    meaning = page("ewc").find(id="about-term-predictive-distribution").get_text(" ", strip=True).split(":")[0]
    assert not tip.is_visible()
    link.hover()
    tip.wait_for(state="visible")
    assert meaning in tip.inner_text()
    assert link.get_attribute("aria-describedby") == "ewc-definition"
    tab.keyboard.press("Escape")
    tip.wait_for(state="hidden")
    tab.mouse.move(5, 5)
    link.focus()
    tip.wait_for(state="visible")
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 1280
    assert tip.locator("a, [tabindex]").count() == 0
    tab.keyboard.press("Tab")  # the next word has a definition, too
    assert link.get_attribute("aria-describedby") is None
    link.evaluate("() => document.activeElement.blur()")
    tip.wait_for(state="hidden")
    symbol = tab.locator("article a.sym").first
    symbol.focus()
    tip.wait_for(state="visible")
    # browsers ask for the icon when they like, and for the fonts of formulas as these come near
    assert not [url for url in requests if not url.endswith(("favicon.svg", ".woff2"))]
    tab.close()

    phone = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True)
    tab = phone.new_page()
    tab.goto((SITE / "ewc.html").as_uri(), wait_until="load")
    link, tip = tab.locator("article a[href*='#term-predictive']").first, tab.locator("#ewc-definition")
    link.tap()
    tip.wait_for(state="visible")
    assert tab.url.endswith("ewc.html")
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390
    link.tap()
    tab.wait_for_url("**/glossary.html#term-*")
    phone.close()


@pytest.mark.site
def test_terms_are_links_without_a_script(browser):
    plain = browser.new_context(java_script_enabled=False)
    tab = plain.new_page()
    tab.goto((SITE / "ewc.html").as_uri(), wait_until="load")
    tab.locator("article a[href*='#term-predictive']").first.click()
    tab.wait_for_url("**/glossary.html#term-predictive-distribution")
    plain.close()
