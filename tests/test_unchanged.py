"""A finished site is left alone as long as nothing changed, and not a moment longer."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sources import ROOT

spec = importlib.util.spec_from_file_location("unchanged", ROOT / "tools/unchanged.py")
unchanged = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unchanged)
finished = unchanged.book_finished


def built(book: Path, during: Callable[[], object] = lambda: None, warnings: int = 0, error: object = None) -> None:
    """What the extension does in a build, without the build."""
    app = SimpleNamespace(
        outdir=str(book / "_build/html"), srcdir=str(book), builder=SimpleNamespace(format="html"), _warncount=warnings
    )
    finished.begin(app, None)
    finished.remember(app, None)
    during()
    finished.end(app, error)


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (
        "book/_ext/ext.py",
        "book/bayes.md",
        "ewc_code/fisher.py",
        "ewc_code/sample/x.xz",
        "_build/html/a.html",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "_config.yml").write_text("title: a")
    monkeypatch.setattr(finished, "settings", lambda: ["laptop", ("full",)])
    monkeypatch.setenv(finished.ASKED, "1")
    return tmp_path


def test_nothing_is_known_before_the_first_build(book: Path) -> None:
    assert unchanged.main(book) == 1


def test_a_finished_site_is_up_to_date(book: Path, capsys: pytest.CaptureFixture) -> None:
    built(book)
    assert unchanged.main(book) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda book: (book / "book/bayes.md").write_text("other"),
        lambda book: (book / "book/_ext/ext.py").write_text("other"),
        lambda book: (book / "ewc_code/fisher.py").write_text("other"),
        lambda book: (book / "ewc_code/sample/x.xz").write_text("other"),
        lambda book: (book / "ewc_code/new.py").write_text(""),
        lambda book: (book / "_config.yml").write_text("title: b"),
        lambda book: (book / "book/bayes.md").rename(book / "book/beyond.md"),
        lambda book: (book / "_build/html/a.html").unlink(),
        lambda book: (book / "_build/html/a.html").write_text("touched"),
        lambda book: (book / "_build/finished.json").write_text('{"sources": '),
    ],
    ids=[
        "chapter",
        "extension",
        "package",
        "data",
        "new file",
        "configuration",
        "name",
        "page lost",
        "page touched",
        "half",
    ],
)
def test_any_change_is_a_build(book: Path, change: Callable[[Path], object]) -> None:
    built(book)
    change(book)
    assert unchanged.main(book) == 1


def test_other_settings_are_a_build(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(book)
    monkeypatch.setattr(finished, "settings", lambda: ["smoke", ("full",)])
    assert unchanged.main(book) == 1


def test_settings_name_scale_data_device_and_everything_installed() -> None:
    found = finished.settings()
    assert found == finished.settings()
    assert any(name.startswith("torch ") for name in found[1])
    assert found[2] in ("smoke", "laptop", "paper")


def test_the_makefile_alone_asks_for_the_note(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another table of contents, or warnings that are let pass, make another site."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    at = lines.index(next(line for line in lines if line.startswith("html:")))
    strict = f"@$(BIN)/python tools/unchanged.py || {finished.ASKED}=1 $(BUILD) -n -W --keep-going"
    assert lines[at + 1].strip() == strict
    assert sum(finished.ASKED in line for line in lines) == 1
    monkeypatch.delenv(finished.ASKED)
    built(book)
    assert unchanged.main(book) == 1


@pytest.mark.parametrize("what", [{"warnings": 1}, {"error": RuntimeError("no")}], ids=["warnings", "failed"])
def test_a_build_that_did_not_succeed_is_not_noted_and_takes_the_note_away(book: Path, what: dict) -> None:
    built(book)
    built(book, **what)
    assert unchanged.main(book) == 1


def test_a_chapter_changed_while_the_book_is_built_is_built_again(book: Path) -> None:
    """The page holds the old text: noted with the new text's hash, the site would count as up to date for ever."""
    built(book, during=lambda: (book / "book/bayes.md").write_text("edited"))
    assert unchanged.main(book) == 1
    built(book)
    assert unchanged.main(book) == 0


def test_the_note_is_gone_before_the_first_page_is(book: Path) -> None:
    """So that a build killed at any moment leaves a site that counts as none."""
    built(book)
    with pytest.raises(KeyboardInterrupt):
        built(book, during=lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert unchanged.main(book) == 1
