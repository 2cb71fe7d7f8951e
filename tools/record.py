"""Make the recorded runs, which take longer than a build may: `make record`, or `make record WHAT=scenarios`.

figure2      all panels of "The paper, reproduced": minutes on a GPU, an hour or two on two cores
scenarios    split MNIST of "Where it fails", told the task and asked for the class: about an hour on two cores
fifty        fifty permuted tasks of "Beyond the diagonal": about half an hour on two cores

Each writes one file into `book/recorded`: the results with device, versions, date, commit, settings and seconds.
Finished runs are kept in `_build/recorded`, so that a recording that was stopped goes on where it stopped.
"""

import argparse
import datetime
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ewc_checks import provenance
from ewc_code import data, environment
from ewc_experiments import beyond, figure2, scenarios
from ewc_experiments.comparison import as_json

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "_build" / "recorded"
PANELS = {
    "2A": (figure2.FIGURE_2A, figure2.figure_2a),
    "2B": (figure2.FIGURE_2B, figure2.figure_2b),
    "2C": (figure2.FIGURE_2C, figure2.figure_2c),
}


def say(name: str, line: str) -> None:
    """Progress."""
    print(f"{name}: {line}", flush=True)


def record_figure2(scale: str) -> dict[str, Any]:
    """All panels of the paper's Figure 2."""
    panels = {}
    for name, (settings, run) in PANELS.items():
        started = time.monotonic()
        options = {} if name == "2C" else {"folder": KEPT}
        found = run(settings[scale], progress=partial(say, name), **options)
        panels[name] = json.loads(as_json(found)) | {"seconds": time.monotonic() - started}
    return {"panels": panels}


def record_scenarios(scale: str) -> dict[str, Any]:
    """Split MNIST, the scenarios and methods that the chapter compares with published numbers."""
    setup = replace(scenarios.SPLIT[scale], sets=("MNIST",))
    table = scenarios.compare(setup, partial(say, "scenarios"), scenarios.RECORDED, KEPT)
    return {"setup": asdict(setup), "table": scenarios.stored(table["MNIST"])}


def record_fifty(scale: str) -> dict[str, Any]:
    """Fifty permuted tasks."""
    setup = beyond.FIFTY if scale == "paper" else beyond.SEQUENCES[scale]
    found = beyond.sequences(setup, partial(say, "fifty"), str(KEPT))
    return {"setup": asdict(setup), "found": beyond.stored(found)}


RECORDINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "figure2": record_figure2,
    "scenarios": record_scenarios,
    "fifty": record_fifty,
}


def main() -> None:
    """Make each recording at one scale, and write its file whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", metavar="WHAT", help="of figure2, scenarios, fifty; all by default")
    parser.add_argument("--scale", choices=figure2.FIGURE_2B, default="paper")
    given = parser.parse_args()
    if unknown := set(given.what) - set(RECORDINGS):
        parser.error(f"WHAT must be of {', '.join(RECORDINGS)}; got {', '.join(sorted(unknown))}")
    if data.source() != "full":
        raise SystemExit("a recorded run must be made on the full data; the embedded sample is in use. Set EWC_DATA.")
    if changed := git("status", "--porcelain", "--", "ewc_code", "ewc_experiments"):
        raise SystemExit(f"a recorded run must be that of a commit; the packages have changes:\n{changed}")
    for what in given.what or RECORDINGS:
        started, commit = time.monotonic(), git("rev-parse", "HEAD")
        found = RECORDINGS[what](given.scale)
        record = {
            "scale": given.scale,
            "device": str(environment.device()),
            "hardware": provenance.hardware(),
            "versions": provenance.versions(),
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "commit": commit,
            "seconds": time.monotonic() - started,  # of this call: what was kept from one before is not counted
            **found,
        }
        path = ROOT / "book" / "recorded" / f"{what}-{given.scale}-{environment.device().type}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".partial")
        part.write_text(json.dumps(record) + "\n")
        part.replace(path)
        print(f"wrote {path.relative_to(ROOT)}")


def git(*arguments: str) -> str:
    """What git says about this copy of the book."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
