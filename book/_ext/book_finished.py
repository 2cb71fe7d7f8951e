"""One build at a time in a folder, and a note of what the finished site was built from.

A build holds a lock, which the system frees however the build ends; another one in the same folder waits for it. The
note is gone before the first page is, and comes back when the site is whole, had not a single warning, and no file that
it depends on has changed since the build began. `tools/unchanged.py` compares it with what is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout
from sphinx.util import logging

logger = logging.getLogger(__name__)
NOTE, ASKED = "finished.json", "BOOK_NOTE"  # the file, and the variable by which the Makefile asks for it
SOURCES = ("book/**/*", "ewc_*/**/*", "benchmarks/results/*", "_config.yml", "_toc.yml", "requirements.txt",
           "pyproject.toml", "Makefile", "LICENSE", "CITATION.cff")  # fmt: skip


def alone(folder: Path, say) -> FileLock:
    """The lock of an output folder, held; says so once where that has to wait for another build."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another build is at work in {folder}; this one goes on when it has ended")
        lock.acquire()
    return lock


def settings() -> list:
    """What the numbers of a build depend on, beside its files."""
    from ewc_checks import provenance
    from ewc_code import data, environment

    installed = sorted(f"{found.metadata['Name']} {found.version}" for found in metadata.distributions())
    return [
        sys.version,
        installed,
        environment.scale(),
        data.source(),
        str(environment.device()),
        provenance.versions(),
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
    """What a site is built from."""
    return {"sources": sources(root), "settings": settings()}


def begin(app, config) -> None:
    """Wait for other builds, before anything of an earlier one is touched; then nothing is finished any more."""
    folder = Path(app.outdir).parent
    app.book_lock = alone(folder, lambda line: logger.info("book: %s", line))
    (folder / NOTE).unlink(missing_ok=True)


def remember(app, config) -> None:
    """What the site will be built from, once the settings are settled."""
    app.book_began = described(Path(app.srcdir))


def end(app, exception) -> None:
    """Note a whole site, after all extensions wrote to it."""
    folder, root = Path(app.outdir).parent, Path(app.srcdir)
    if exception is None and app.builder.format == "html" and os.environ.get(ASKED) and not app._warncount:
        if described(root) == app.book_began:
            part = folder / f"{NOTE}.part"
            part.write_text(json.dumps(app.book_began | {"site": site(Path(app.outdir))}))
            part.replace(folder / NOTE)
        else:
            logger.info("book: a file changed while the book was built; the next `make html` builds it again")
    app.book_lock.release()


def setup(app):
    """First and last of all."""
    app.connect("config-inited", begin, priority=300)
    app.connect("config-inited", remember, priority=450)
    app.connect("build-finished", end, priority=999)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
