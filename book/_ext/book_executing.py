"""Execute every notebook before Sphinx reads a page, and say what this build is.

MyST-NB can execute notebooks itself, but it keys its cache on the code cells alone, shows no progress, and lets a
failed page look finished in the next incremental build. Here

* the cache belongs to one fingerprint of everything that the cells depend on and is dropped when that changes,
* pages and doctrees are written anew in every build, so that nothing of a failed build survives,
* a failing cell ends the build, whether or not warnings are errors.

MyST-NB then finds each notebook in the cache. The result is `app.book`, a `Build`.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import json
import os
import shutil
import sys
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.read import create_nb_reader
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.errors import ExtensionError
from sphinx.util import logging

from book_model import Build, Chapter
from book_notebooks import CellFailure, collect, docnames_in_order, execute

logger = logging.getLogger(__name__)


def resolve(app, config) -> None:
    """Settle scale, data source and device once, and pin them for all kernels; forget the previous pages."""
    try:
        names = ("ewc_code.data", "ewc_code.environment", "ewc_checks.provenance")
        data, environment, provenance = map(importlib.import_module, names)
    except Exception as error:
        raise ExtensionError(f"the package ewc_code cannot be imported: {error!r}", error) from error
    try:
        build = Build(
            scale=environment.scale(),
            data_source=data.source(),
            device=str(environment.device()),
            hardware=provenance.hardware(),
            versions=provenance.versions(),
            threads=importlib.import_module("torch").get_num_threads(),
        )
    except (ValueError, OSError) as error:
        raise ExtensionError(str(error)) from error
    # Documents are large graphs of small objects that live to the end: looking for garbage among them at Python's
    # default rate took a fifth of an unchanged build.
    gc.set_threshold(200_000, 20, 100)
    # A thread that waits for another may spin for some tens of microseconds: asleep at once, small networks train at
    # half the speed; spinning for as long as OpenMP's default, a busy machine costs many times the work itself.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ["EWC_SCALE"] = build.scale
    os.environ["EWC_DEVICE"] = build.device
    if build.data_source == "sample":
        os.environ["EWC_DATA"] = "sample"
    elif os.environ.get("EWC_DATA"):
        # Kernels run in the chapters' folder, where a relative path would mean another place.
        os.environ["EWC_DATA"] = str(Path(os.environ["EWC_DATA"]).resolve())
    app.book = build
    for folder in (app.doctreedir, app.outdir, Path(app.outdir).parent / "jupyter_execute"):
        shutil.rmtree(folder, ignore_errors=True)
    Path(app.outdir).mkdir(parents=True)


def fingerprint(app) -> str:
    """Hash of the imported package, the declared inputs, the interpreter, torch, scale, data and device."""
    root, package = Path(app.srcdir), Path(importlib.import_module("ewc_code").__file__).parent
    files = [path for path in package.rglob("*") if "__pycache__" not in path.parts]
    files += [path for pattern in app.config.book_inputs for path in root.glob(pattern)]
    digest = hashlib.sha256()
    for path in sorted(path for path in set(files) if path.is_file()):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    build = app.book
    settings = [sys.version, build.versions, build.scale, build.data_source, build.device]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    return digest.hexdigest()


def seal(folder: Path) -> str:
    """Hash of all that a cache holds: where power or a disk failed, no number of it may reach a page."""
    digest = hashlib.sha256()
    for path in sorted(path for path in (folder / "executed").rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def open_cache(folder: Path, key: str):
    """The execution cache of `key`. One of another key, left in the middle of a write or altered, is dropped first."""
    stored, sealed, writing = (folder / name for name in ("fingerprint", "seal", "writing"))
    found = [path.read_text() if path.exists() else None for path in (stored, sealed)]
    if writing.exists() or found != [key, seal(folder)]:
        if folder.exists():
            reason = "its cache is damaged" if found[0] == key else "the package, its requirements or settings changed"
            logger.info("book: %s; every chapter runs again", reason)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        get_cache(str(folder)).list_cache_records()  # makes the tables: without them the cache counts as none
        sealed.write_text(seal(folder))
        partial = folder / "fingerprint.partial"
        partial.write_text(key)
        partial.replace(stored)
    return get_cache(str(folder))


def execute_all(app, env, docnames) -> None:
    """Run what is not in the cache, one chapter after the other; then read checks and timings of all of them."""
    folder, key = Path(env.mystnb_config.execution_cache_path), fingerprint(app)
    cache = open_cache(folder, key)
    pages = []
    for docname, numbered in docnames_in_order(env):
        path = Path(env.doc2path(docname))
        text = path.read_text(encoding="utf-8")
        reader = create_nb_reader(str(path), env.myst_config, env.mystnb_config, text)
        if reader is not None:
            pages.append((docname, numbered, path, reader.read(text)))

    failures: list[CellFailure] = []
    for i, (docname, numbered, path, notebook) in enumerate(pages, start=1):
        executed = False
        try:
            record = cache.match_cache_notebook(notebook)
        except KeyError:
            try:
                seconds, megabytes = execute(notebook, path, f"[{i}/{len(pages)}] {docname}")
            except CellFailure as failure:
                failures.append(failure)
                continue
            executed, data = True, {"execution_seconds": seconds, "peak_megabytes": megabytes}
            (folder / "writing").touch()
            record = cache.cache_notebook_bundle(
                CacheBundleIn(notebook, str(path), data=data), check_validity=False, overwrite=True
            )
            (folder / "seal").write_text(seal(folder))
            (folder / "writing").unlink()
        _, notebook = cache.merge_match_into_notebook(notebook)
        chapter: Chapter = collect(docname, numbered, notebook)
        chapter.seconds = record.data.get("execution_seconds")
        chapter.peak_megabytes = record.data.get("peak_megabytes")
        chapter.executed = executed
        app.book.chapters[docname] = chapter

    ran = [chapter for chapter in app.book.chapters.values() if chapter.executed]
    logger.info("book: %d of %d notebooks executed, the others came from the cache", len(ran), len(pages))
    if failures:
        for failure in failures:
            logger.error("%s\n%s", failure, failure.traceback, location=failure.location)
        raise ExtensionError(f"{len(failures)} notebook(s) failed: " + "; ".join(map(str, failures)))
    if fingerprint(app) != key:
        (folder / "fingerprint").unlink(missing_ok=True)
        logger.warning("the package or its requirements changed while the chapters ran; build again", type="book")


def confirm(app, env) -> None:
    """The pages must hold the very run that was read here: no notebook may have been executed elsewhere."""
    for docname, chapter in app.book.chapters.items():
        shown = NbMetadataCollector.get_exec_data(env, docname)
        if shown is None or shown["runtime"] != chapter.seconds:
            logger.warning("the page shows another run than the ledger", location=docname, type="book")


def setup(app):
    """Connect to Sphinx; `book_inputs` are globs of further files (below the source folder) that cells depend on."""
    inputs = [
        "requirements.txt",
        "pyproject.toml",
        "book/recorded/**/*",
        "benchmarks/results/*",
        "ewc_checks/*",
        "ewc_plots/*",
        "ewc_experiments/*",
    ]
    app.add_config_value("book_inputs", inputs, "env")
    app.connect("config-inited", resolve, priority=400)
    app.connect("env-before-read-docs", execute_all)
    app.connect("env-updated", confirm)
    return {"parallel_read_safe": False}
