"""The notebooks: made from the chapters as they are now, without the book's markup, with all of the chapters' code."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from bs4 import BeautifulSoup

import sources

sys.path.insert(0, str(sources.ROOT / "tools"))
import make_notebooks as made

CHAPTERS = [name.split("/")[-1] for name in sources.chapters()]
MARKUP = (
    r"\{[a-z:-]+\}`|:::|`{3}\{|^\([\w-]+\)=\s*$|<!--|^:(label|class):|\$\$[ \t]*\([\w-]+\)"
    r"|\\(E|KL|Var|Cov|Normal|Data|R|T|diag|tr|grad|Hess|given|abs|norm|argm\w+|softmax)(?![A-Za-z])"
)


@pytest.fixture(scope="module")
def book():
    return made.read_book()


def read(name):
    return json.loads((sources.ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def test_notebooks_are_those_of_the_chapters():
    wanted = made.notebooks()
    assert {path.name for path in made.FOLDER.glob("*")} == {path.name for path in wanted}
    old = [path.name for path, text in wanted.items() if path.read_text(encoding="utf-8") != text]
    assert not old, f"out of date: {old}; run `make notebooks` and commit what it writes"


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_notebook_is_valid_and_has_not_run(name):
    notebook = read(name)
    nbformat.validate(nbformat.from_dict(notebook))
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_markup_of_the_book_is_left(name):
    for cell in read(name)["cells"]:
        if cell["cell_type"] == "markdown" or source(cell).startswith("# @title Text"):
            text = re.sub(r"`{3}python.*?`{3}", "", source(cell), flags=re.DOTALL)  # code has braces of its own
            assert not (found := re.search(MARKUP, text, re.MULTILINE)), (found.group(), text[:200])


@pytest.mark.parametrize("name", CHAPTERS)
def test_all_code_is_there_in_order(name):
    cells = sources.cells((sources.ROOT / f"book/{name}.md").read_text(encoding="utf-8"))
    wanted = [(cell.code.strip("\n"), next((tag for tag in made.FOLDED if tag in cell.tags), "")) for cell in cells]
    code = [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]
    own = [cell for cell in code[1:] if not source(cell).startswith("# @title Text")]
    assert [made.FOLDED.get(tag, "") + code for code, tag in wanted] == [source(cell) for cell in own]
    assert [bool(tag) for _, tag in wanted] == [cell["metadata"].get("cellView") == "form" for cell in own]


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_number_in_the_text_is_glued_below_it(name):
    # An exercise holds its starter code as text, which computes nothing.
    cells, late = [source(cell) for cell in read(name)["cells"] if cell["cell_type"] == "code"], []
    for i, text in enumerate(cells):
        for glued in re.findall(r"«([^»:]+)", text) if text.startswith("# @title Text") else ():
            below = any(f'"{glued}"' in later for later in cells[i + 1 :])
            late += [glued] if below and not any(f'"{glued}"' in earlier for earlier in cells[:i]) else []
    assert not late, f"a page may show what a later cell computes, a notebook cannot: glue these earlier: {late}"


def test_every_notebook_begins_with_the_same_set_up(book):
    first = {source(next(cell for cell in read(name)["cells"] if cell["cell_type"] == "code")) for name in CHAPTERS}
    assert len(first) == 1
    (code,) = first
    assert f"git+{book.config['repository']['url']}@" in code
    assert len(re.findall("laptop", code.split("\n\n")[0])) == 2, "one marked line sets the scale"
    compile(code, "set-up", "exec")


def test_the_set_up_leaves_a_package_that_is_there_alone(monkeypatch, capsys):
    config = {"url": "https://nowhere.invalid/book", "branch": "main"}
    monkeypatch.setenv("EWC_SCALE", "paper")
    monkeypatch.setenv("EWC_DATA", "sample")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("installed something"))
    for _ in range(2):
        exec(made.SETUP.format(**config), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["device", "scale", "data"] * 2
    assert printed[1] == "scale:  laptop"
    assert printed[2] == "data:   sample"


def test_a_set_up_that_cannot_install_says_what_pip_said(monkeypatch):
    monkeypatch.setenv("EWC_SCALE", "smoke")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no such host")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"could not be installed from .*nowhere.*\n.*no such host"):
        exec(made.SETUP.format(url="https://nowhere.invalid/book", branch="main"), {})


def notebook(book, text):
    return made.Notebook(book, "ewc", text).make()["cells"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Text.\n\nSee {unheard}`of`.\n", r"line 3: the role \{unheard\} has no form"),
        ("```{unheard} x\n```\n", r"line 1: the directive \{unheard\} has no form"),
        ("{ref}`no-such-label`\n", "'no-such-label' is not in any chapter"),
        ("{cite}`nobody1900`\n", "'nobody1900' is not in book/references.bib"),
        ("```{code-cell}\nx = 1\n", "line 1: .* is never closed"),
    ],
)
def test_what_has_no_form_is_an_error_with_its_line(book, text, says):
    with pytest.raises(made.Unknown, match=says):
        notebook(book, text)


def test_macros_are_written_out():
    macros = {r"\KL": r"\operatorname{KL}\left(#1\,\middle\|\,#2\right)", r"\d": r"\mathrm{d}", r"\given": r"\mid"}
    assert made.expanded(r"\KL{p_{a}}{q}", macros) == r"\operatorname{KL}\left(p_{a}\,\middle\|\,q\right)"
    assert made.expanded(r"\d x\delta", macros) == r"\mathrm{d} x\delta"
    assert made.expanded(r"a\given b", macros) == r"a\mid b"
    with pytest.raises(made.Unknown, match="do not close"):
        made.expanded(r"\KL{p", macros)


def test_formulas_in_a_box_stay_on_a_line(book):
    (cell,) = notebook(book, ":::{admonition} Title\nBefore\n\n$$\na\n\\\\\nb\n$$\n:::\n")
    assert source(cell) == "> **Title**\n>\n> Before\n>\n> $$\\begin{aligned}a \\\\ b\\end{aligned}$$"


def test_indented_code_stays_as_it_is(book):
    (cell,) = notebook(book, "Text:\n\n    for x in y:\n        pass\n")
    assert source(cell) == "Text:\n\n    for x in y:\n        pass"


def test_sentences_with_numbers_become_cells_that_show_them(book):
    cells = notebook(book, "Before.\n\nAbout {glue:text}`ewc_x:.1f` points.\n\nAfter.\n")
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "markdown"]
    assert source(cells[1]) == '# @title Text with numbers of this run\nsay(r"""\nAbout «ewc_x:.1f» points.\n""")'


@pytest.mark.site
@pytest.mark.parametrize("name", CHAPTERS)
def test_numbers_are_those_of_the_pages(name, book):
    page = sources.ROOT / f"_build/html/book/{name}.html"
    html = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    shown = {tag["id"].removeprefix("equation-"): tag.select_one(".eqno") for tag in html.select('[id^="equation-"]')}
    shown |= {tag["id"]: tag.select_one(".caption-number") for tag in html.select("figure[id]")}
    shown |= {
        tag["id"]: tag.select_one(".caption-number, .admonition-title") for tag in html.select(".proof, .exercise")
    }
    mine = {label: target for label, target in book.targets.items() if target.chapter == name and "." in target.number}
    assert mine
    for label, target in mine.items():
        assert label in shown, label
        numbers = re.findall(r"\d+\.\d+", shown[label].get_text())
        assert numbers[:1] == [target.number], (label, shown[label].get_text())


@pytest.mark.site
@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_has_a_button_and_a_link_to_its_notebook(name, book):
    page = sources.ROOT / f"_build/html/book/{name}.html"
    html = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    wanted = book.colab(name)
    assert [tag["href"] for tag in html.select("a.btn-colab")] == [wanted]
    assert [tag["href"] for tag in html.select(".provenance a")] == [wanted]
    assert (sources.ROOT / "notebooks" / wanted.rsplit("/", 1)[-1]).is_file()
