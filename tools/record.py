"""Make the recorded runs of the chapter "The paper, reproduced": `make record`.

Writes `book/recorded/figure2-SCALE-DEVICE.json`: the results with device, versions, date, commit, settings and seconds.
Finished runs are kept in `_build/recorded`, so that a recording that was stopped goes on where it stopped.
"""

import argparse
import datetime
import json
import subprocess
import time
from pathlib import Path

from ewc_code import data, environment
from ewc_experiments import figure2
from ewc_experiments.comparison import as_json

ROOT = Path(__file__).parents[1]
PANELS = {
    "2A": (figure2.FIGURE_2A, figure2.figure_2a),
    "2B": (figure2.FIGURE_2B, figure2.figure_2b),
    "2C": (figure2.FIGURE_2C, figure2.figure_2c),
}


def main() -> None:
    """Run all panels at one scale, and write the file whole or not at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", choices=figure2.FIGURE_2B, default="paper")
    scale = parser.parse_args().scale
    if data.source() != "full":
        raise SystemExit("a recorded run must be made on the full data; the embedded sample is in use. Set EWC_DATA.")
    if changed := git("status", "--porcelain", "--", "ewc_code", "ewc_experiments"):
        raise SystemExit(f"a recorded run must be that of a commit; the packages have changes:\n{changed}")
    panels, commit = {}, git("rev-parse", "HEAD")
    for name, (settings, run) in PANELS.items():
        started = time.monotonic()
        options = {} if name == "2C" else {"folder": ROOT / "_build" / "recorded"}
        found = run(settings[scale], progress=lambda line, name=name: print(f"{name}: {line}", flush=True), **options)
        panels[name] = json.loads(as_json(found)) | {"seconds": time.monotonic() - started}
    record = {
        "scale": scale,
        "device": str(environment.device()),
        "hardware": environment.hardware(),
        "versions": environment.versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "panels": panels,
    }
    path = ROOT / "book" / "recorded" / f"figure2-{scale}-{environment.device().type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(path)
    print(f"wrote {path.relative_to(ROOT)}")


def git(*arguments: str) -> str:
    """What git says about this copy of the book."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
