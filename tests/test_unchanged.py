"""A finished site is left alone as long as nothing changed, and not a moment longer."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from sources import ROOT

spec = importlib.util.spec_from_file_location("unchanged", ROOT / "tools/unchanged.py")
unchanged = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unchanged)


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
    monkeypatch.setattr(unchanged, "settings", lambda: ["laptop", ("full",)])
    return tmp_path


def test_nothing_is_known_before_the_first_build(book: Path) -> None:
    assert unchanged.main(book, []) == 1


def test_a_finished_site_is_up_to_date(book: Path, capsys: pytest.CaptureFixture) -> None:
    assert unchanged.main(book, ["--finished"]) == 0
    assert unchanged.main(book, []) == 0
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
    unchanged.main(book, ["--finished"])
    change(book)
    assert unchanged.main(book, []) == 1


def test_other_settings_are_a_build(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unchanged.main(book, ["--finished"])
    monkeypatch.setattr(unchanged, "settings", lambda: ["smoke", ("full",)])
    assert unchanged.main(book, []) == 1


def test_settings_name_scale_data_device_and_everything_installed() -> None:
    found = unchanged.settings()
    assert found == unchanged.settings()
    assert any(name.startswith("torch ") for name in found[1])
    assert found[2] in ("smoke", "laptop", "paper")


def test_the_makefile_notes_only_a_build_that_succeeded() -> None:
    lines = (ROOT / "Makefile").read_text().splitlines()
    at = lines.index(next(line for line in lines if line.startswith("html:")))
    assert lines[at + 1].strip() == "@$(BIN)/python tools/unchanged.py || { \\"
    assert lines[at + 2].strip() == "$(BUILD) -n -W --keep-going && $(BIN)/python tools/unchanged.py --finished; }"
