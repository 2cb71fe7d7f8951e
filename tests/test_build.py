"""A build cannot be green by mistake: tiny books with planted faults, built with the book's own extensions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sources import ROOT

FRONT = """---
jupytext: {text_representation: {extension: .md, format_name: myst}}
kernelspec: {display_name: Python 3, language: python, name: python3}
---

"""

GOOD = """# A chapter

```{code-cell}
import sympy as sp
from ewc_checks import claim, glue, identity
a, b = sp.symbols("a b", real=True)
glue("NAME_answer", 42.5)
```

The answer is {glue:text}`NAME_answer:.1f`.

$$ a^2 + b^2 = c^2 $$ (eq-NAME)

By {eq}`eq-NAME` and {cite:t}`known`.

```{code-cell}
:tags: [check]
identity("square of NAME", (a + b) ** 2, a**2 + 2 * a * b + b**2)
claim("one is less than two in NAME", 1 < 2, {"one": 1.25})
```
"""

PICTURE = """
```{code-cell}
import matplotlib.pyplot as plt
plt.plot([1, 2]);
```
"""

FAULTY = (
    GOOD.replace("a^2 + b^2", r"a^2 + \undefinedmacro")
    .replace("`known`", "`nobody`")
    .replace(
        "By {eq}`eq-NAME`",
        "{in-code}`ewc_code.gaussian.Full.energy: nothing`\n\nBy {eq}`eq-nowhere`, {doc}`nowhere`, [a link](#nowhere)",
    )
    .replace("claim(", 'claim("square of NAME", True, {"again": 1})\nclaim(')
    + PICTURE
)


class Book:
    """A book in a folder of its own, with a copy of the package to edit."""

    def __init__(self, folder: Path, chapters: dict[str, str]):
        self.folder = folder
        (folder / "book").mkdir(parents=True)
        shutil.copytree(ROOT / "ewc_code", folder / "ewc_code", ignore=shutil.ignore_patterns("__pycache__"))
        config = yaml.safe_load((ROOT / "_config.yml").read_text())
        sphinx = config["sphinx"]
        sphinx["local_extensions"] = {name: str(ROOT / path) for name, path in sphinx["local_extensions"].items()}
        sphinx["config"]["html_static_path"] = [str(ROOT / "book/_static")]
        sphinx["config"]["book_katex_css"] = str(ROOT / "book/_static/katex/katex.min.css")
        config["html"].pop("favicon")
        (folder / "_config.yml").write_text(yaml.safe_dump(config))
        parts = [{"caption": "I", "numbered": True, "chapters": [{"file": f"book/{name}"} for name in chapters]}]
        (folder / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "book/index", "parts": parts}))
        (folder / "book/index.md").write_text("# Start\n\n```{ledger}\n```\n\n```{bibliography}\n```\n")
        (folder / "book/references.bib").write_text("@misc{known, author={Known, A.}, title={T}, year={2000}}\n")
        for name, text in chapters.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.folder / f"book/{name}.md").write_text(FRONT + text.replace("NAME", name))

    def build(self) -> subprocess.CompletedProcess:
        """Build as the Makefile does."""
        environment = os.environ | {"EWC_DATA": "sample", "EWC_SCALE": "smoke", "PYTHONPATH": str(self.folder)}
        command = [Path(sys.executable).with_name("jupyter-book"), "build", ".", "-n", "-W", "--keep-going"]
        return subprocess.run(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def ledger(self) -> dict:
        return json.loads((self.folder / "_build/html/book/ledger.json").read_text())


def test_a_good_book_executes_only_what_changed(tmp_path):
    book = Book(tmp_path, {"one": GOOD, "two": GOOD})
    result = book.build()
    assert result.returncode == 0, result.stdout
    assert "2 of 2 notebooks executed" in result.stdout
    assert "[1/2] book/one: cell 1/2" in result.stdout
    first = book.ledger()
    assert [entry["name"] for entry in first["entries"]][:2] == ["square of one", "one is less than two in one"]
    assert first["build"]["results"]["one"] == {"one_answer": 42.5}

    result = book.build()
    assert result.returncode == 0, result.stdout
    assert "0 of 2 notebooks executed" in result.stdout
    assert book.ledger() == first

    book.write("two", GOOD.replace('"one": 1.25', '"one": 1.5'))
    result = book.build()
    assert result.returncode == 0, result.stdout
    assert "1 of 2 notebooks executed" in result.stdout
    changed = book.ledger()["entries"]
    assert changed[:3] == first["entries"][:3]
    assert changed[3]["values"] == {"one": 1.5}

    (book.folder / "ewc_code/models.py").open("a").write("\n# changed\n")
    result = book.build()
    assert result.returncode == 0, result.stdout
    assert "2 of 2 notebooks executed" in result.stdout


def test_failing_cells_and_wrong_signs_fail_every_time(tmp_path):
    broken = GOOD + "\n```{code-cell}\nraise RuntimeError('planted')\n```\n"
    wrong = GOOD.replace("+ 2 * a * b", "- 2 * a * b")
    book = Book(tmp_path, {"broken": broken, "wrong": wrong})
    for run in ("first", "second"):
        result = book.build()
        assert result.returncode != 0, run
        assert "book/broken.md, cell 3 of 3: RuntimeError: planted" in result.stdout, run
        assert "book/wrong.md, cell 2 of 2: CheckFailed" in result.stdout, run
        assert not (book.folder / "_build/html/book/broken.html").exists(), run


def test_faults_of_a_page_fail_every_time(tmp_path):
    book = Book(tmp_path, {"faulty": FAULTY, "unchecked": GOOD.split("```{code-cell}\n:tags")[0]})
    for run in ("first", "second"):
        result = book.build()
        assert result.returncode != 0, run
        for fault in (
            "without alternative text",
            "no line of ewc_code.gaussian.Full.energy has 'nothing' in it",
            "Undefined control sequence",
            'could not find bibtex key "nobody"',
            "equation not found: eq-nowhere",
            "unknown document: 'nowhere'",
            "'myst' cross-reference target not found: 'nowhere'",
            "2 checks named check-square-of-faulty",
            "unchecked.md: WARNING: a chapter without a single check",
        ):
            assert fault in result.stdout, f"{fault} was not reported in the {run} run"
        assert "Exception occurred" not in result.stdout, run


@pytest.fixture
def executing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "book/_ext"))
    return pytest.importorskip("book_executing")


def test_a_cache_left_in_the_middle_of_a_write_is_dropped(executing, tmp_path):
    folder = tmp_path / "cache"
    executing.open_cache(folder, "key")
    (folder / "kept").touch()
    executing.open_cache(folder, "key")
    assert (folder / "kept").exists()
    (folder / "writing").touch()
    executing.open_cache(folder, "key")
    assert not (folder / "kept").exists()


@pytest.mark.parametrize("damaged", [b'{"cells": [1.26]}', b"", None])
def test_a_cache_that_was_altered_is_dropped(executing, tmp_path, damaged):
    folder = tmp_path / "cache"
    notebook = folder / "executed/a/base.ipynb"
    executing.open_cache(folder, "key")
    notebook.parent.mkdir(parents=True)
    notebook.write_bytes(b'{"cells": [1.25]}')
    (folder / "seal").write_text(executing.seal(folder))
    executing.open_cache(folder, "key")
    assert notebook.exists()
    notebook.unlink() if damaged is None else notebook.write_bytes(damaged)
    executing.open_cache(folder, "key")
    assert not (folder / "executed").exists()


def test_a_cache_of_another_fingerprint_is_dropped(executing, tmp_path):
    folder = tmp_path / "cache"
    executing.open_cache(folder, "key")
    (folder / "kept").touch()
    executing.open_cache(folder, "other")
    assert not (folder / "kept").exists()
    assert (folder / "fingerprint").read_text() == "other"
