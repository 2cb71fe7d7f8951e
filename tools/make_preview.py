"""Draw the picture that stands beside a link to the book, 1200 by 630 pixels: `python tools/make_preview.py`."""

from pathlib import Path

import matplotlib
import numpy as np
import yaml

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

ROOT = Path(__file__).parents[1]
GROUND, OLD, NEW, PLAIN = "#0b3c5d", "#f2a900", "#8ecae6", "#c9d6df"


def valley(axis, centre, axes, angle, colour) -> None:
    """Level lines of a quadratic loss."""
    t = np.linspace(0, 2 * np.pi, 200)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    for level in (1.0, 0.72, 0.42):
        points = turn @ (np.array(axes)[:, None] * level * np.stack([np.cos(t), np.sin(t)])) + np.array(centre)[:, None]
        axis.fill(*points, color=colour, alpha=0.16, linewidth=0)
        axis.plot(*points, color=colour, linewidth=2)


def arrow(axis, start, end, bend, colour, text, at) -> None:
    """The way that training takes."""
    style = {"arrowstyle": "-|>,head_width=0.45,head_length=0.8", "color": colour, "linewidth": 4.5}
    axis.annotate("", end, start, arrowprops=style | {"connectionstyle": f"arc3,rad={bend}"})
    axis.text(*at, text, color=colour, fontsize=21, ha="center", va="center")


def main() -> None:
    """Write the picture with a palette: a preview is fetched by every place where a link is posted."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    preview = config["sphinx"]["config"]["book_preview"]
    figure = plt.figure(figsize=(preview["width"] / 100, preview["height"] / 100), dpi=100, facecolor=GROUND)
    figure.text(0.05, 0.70, "Elastic weight\nconsolidation", color="white", fontsize=45, weight="bold", va="center")
    figure.text(0.05, 0.415, "from Bayes' rule\nto running code", color=OLD, fontsize=33, va="center")
    words = "Every step derived,\nchecked by computer algebra,\nand run."
    figure.text(0.05, 0.175, words, color=PLAIN, fontsize=21, va="center", linespacing=1.4)
    axis = figure.add_axes((0.5, 0.02, 0.49, 0.96))
    axis.set(xlim=(-0.35, 5.7), ylim=(0, 6.05))
    axis.axis("off")
    valley(axis, (2.15, 3.3), (2.35, 0.85), 0.35, OLD)
    valley(axis, (4.35, 2.75), (1.05, 2.5), -0.25, NEW)
    axis.text(0.85, 4.3, "first task", color=OLD, fontsize=22, ha="center")
    axis.text(4.75, 5.45, "second task", color=NEW, fontsize=22, ha="center")
    start = (2.05, 3.25)
    arrow(axis, start, (4.4, 2.3), 0.25, PLAIN, "plain", (2.6, 1.85))
    arrow(axis, start, (3.95, 3.85), -0.15, "white", "EWC", (2.75, 4.05))
    axis.plot(*start, "o", color="white", markersize=13, zorder=3)
    target = ROOT / "book/_static" / preview["file"]
    figure.savefig(target, facecolor=GROUND)
    with Image.open(target) as drawn:
        drawn.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)


if __name__ == "__main__":
    main()
