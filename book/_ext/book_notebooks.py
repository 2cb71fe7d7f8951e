"""Run one notebook with visible progress, and read what its outputs recorded. Used by `book_executing`."""

from __future__ import annotations

import ast
import re
import sys
import time
from pathlib import Path

from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from book_model import CHECK_MIME, Chapter


class CellFailure(Exception):
    """A cell that raised, with its traceback as plain text."""

    def __init__(self, message: str, traceback: str, location: str):
        super().__init__(message)
        self.traceback, self.location = traceback, location


def plain(text: str) -> str:
    """`text` without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def docnames_in_order(env):
    """Yield (docname, numbered) along the table of contents; chapters are the documents of its numbered parts."""
    site = getattr(env, "external_site_map", None)
    if site is None:
        yield from ((docname, False) for docname in sorted(env.found_docs))
        return

    def walk(docname, numbered):
        docname = docname.removesuffix(".md")
        if docname in env.found_docs:
            yield docname, numbered
        if docname in site:
            for tree in site[docname].subtrees:
                for child in tree.files():
                    yield from walk(child, numbered or bool(tree.numbered))

    yield from walk(site.root.docname, False)


def execute(notebook, path: Path, label: str) -> tuple[float, float | None]:
    """Execute `notebook` in place, in the folder of `path`; return seconds and peak memory of its kernel in MB."""
    code = [index for index, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    current, began, megabytes = 0, 0.0, None

    def say(text: str, end: str = "\n") -> None:
        print(text, end=end, file=sys.stderr, flush=True)

    def start(cell, cell_index):
        nonlocal current, began
        if cell_index in code:
            current, began = cell_index, time.perf_counter()
            say(f"{label}: cell {code.index(cell_index) + 1}/{len(code)} ... ", end="")

    def stop(cell, cell_index, execute_reply):
        nonlocal megabytes
        say(f"{time.perf_counter() - began:.1f} s")
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                say(plain(output.text).rstrip())
        megabytes = peak_megabytes(client)

    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name=notebook.metadata.get("kernelspec", {}).get("name", "python3"),
        # Timings in the cells' metadata would change the key under which MyST-NB looks for the notebook.
        record_timing=False,
        extra_arguments=["--log-level=40"],
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=start,
        on_cell_executed=stop,
    )
    started = time.perf_counter()
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as error:
        lines = notebook.metadata.get("source_map") or [0] * len(notebook.cells)
        place = f"{path.parent.name}/{path.name}, cell {code.index(current) + 1} of {len(code)}"
        if isinstance(error, DeadKernelError):
            said, traceback = "the kernel was killed, as a system does that has no memory left", ""
        else:
            said, traceback = f"{error.ename}: {error.evalue}", error.traceback
        raise CellFailure(plain(f"{place}: {said}"), plain(traceback), f"{path}:{lines[current] + 1}") from error
    return time.perf_counter() - started, megabytes


def peak_megabytes(client) -> float | None:
    """Largest resident memory that the kernel ever had, where the system tells (Linux), else None."""
    status = Path(f"/proc/{getattr(client.km.provisioner, 'pid', None)}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return round(int(found[1]) / 1024) if found else None


def collect(docname: str, numbered: bool, notebook) -> Chapter:
    """Title, checks and glued values of an executed notebook."""
    cells = notebook["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    heading = re.search(r"^# (.+)$", prose, re.MULTILINE)
    chapter = Chapter(docname, heading[1].strip() if heading else docname, numbered)
    for output in (output for cell in cells for output in cell.get("outputs", ())):
        chapter.checks += [output["data"][CHECK_MIME]] if CHECK_MIME in output.get("data", {}) else []
        scrapbook = output.get("metadata", {}).get("scrapbook", {})
        if "name" in scrapbook:
            text = output["data"].get(scrapbook.get("mime_prefix", "") + "text/plain", "")
            try:
                chapter.glued[scrapbook["name"]] = ast.literal_eval("".join(text))
            except (ValueError, SyntaxError):
                continue
    return chapter
