"""Write the README's results table and picture from the last build of the book: `make readme`."""

import json
import re
from pathlib import Path

import ewc_plots as plots
from ewc_experiments import plane

ROOT = Path(__file__).parents[1]
LEDGER = ROOT / "_build" / "html" / "book" / "ledger.json"
ROWS = {"plain": "plain training", "L2": "L2 penalty", "EWC": "EWC", "joint": "both at once (ceiling)"}


def table(ledger: dict) -> str:
    """The results of chapter I.5, with what they were computed on."""
    build = ledger["build"]
    found = build["results"]["ewc"]
    lines = [
        "Digits (MNIST), then clothes (Fashion-MNIST), one network, ten shared outputs. Test accuracy after both,",
        f"mean and 95 % interval over {found['ewc_seeds']} seeds, strengths chosen on validation data.",
        "",
        "| method | digits | clothes | average |",
        "|---|---|---|---|",
    ]
    for key, name in ROWS.items():
        cells = " | ".join(found[f"ewc_{key}_{column}"] for column in ("digits", "clothes", "average"))
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        f"Computed at {build['scale']} scale on the {build['data_source']} data, torch {build['versions']['torch']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Replace what stands between the markers, and the picture."""
    if not LEDGER.exists():
        raise SystemExit(f"{LEDGER.relative_to(ROOT)} must exist to take the results from; run `make html` first.")
    readme = ROOT / "README.md"
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    written = table(json.loads(LEDGER.read_text()))
    text = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{written}\n{end}", readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)
    plots.use_style()
    plots.figure_one(plane.figure_one(plane.FigureOne())).savefig(ROOT / "book" / "_static" / "figure-one.png", dpi=110)


if __name__ == "__main__":
    main()
