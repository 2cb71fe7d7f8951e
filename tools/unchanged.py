"""Whether the built site is that of these very sources: then there is nothing to build.

    python tools/unchanged.py              exits with 0 where the finished site is up to date, with 1 where it is not
    python tools/unchanged.py --finished   notes, after a build without a single warning, what the site was built from

Compared are the contents of every file that pages or numbers depend on, the interpreter and the version of everything
installed, the scale, the data's source and the device; and that no file of the site has been touched since.
"""

import hashlib
import json
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("book/**/*", "ewc_*/**/*", "benchmarks/results/*", "_config.yml", "_toc.yml", "requirements.txt",
           "pyproject.toml", "Makefile", "LICENSE", "CITATION.cff")  # fmt: skip


def settings() -> list:
    """What the numbers of a build depend on, beside its files."""
    from ewc_code import data, environment

    installed = sorted(f"{found.metadata['Name']} {found.version}" for found in metadata.distributions())
    return [
        sys.version,
        installed,
        environment.scale(),
        data.source(),
        str(environment.device()),
        environment.versions(),
    ]


def sources(root: Path) -> str:
    """Hash of the names and contents of all source files."""
    digest = hashlib.sha256()
    found = {path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}
    for path in sorted(path for path in found if "__pycache__" not in path.parts):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def site(folder: Path) -> str:
    """Hash of the names, sizes and times of all files of the site."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    told = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def described(root: Path) -> dict:
    """Everything that must be the same."""
    return {"sources": sources(root), "settings": settings(), "site": site(root / "_build/html")}


def main(root: Path, arguments: list[str]) -> int:
    """Note what there is, or compare it with what was noted."""
    note = root / "_build/finished.json"
    now = described(root)
    if arguments == ["--finished"]:
        part = note.with_suffix(".part")
        part.write_text(json.dumps(now))
        part.replace(note)
        return 0
    try:
        same = json.loads(note.read_text()) == json.loads(json.dumps(now))
    except (OSError, ValueError):
        same = False
    if same:
        print("nothing changed since the last build: _build/html/index.html is up to date (`make clean` builds anew)")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(ROOT, sys.argv[1:]))
