"""Figures of the chapter "The paper, reproduced"."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ewc_code.metrics import Interval
from ewc_experiments.figure2 import Cell
from ewc_plots.learning import LOOK
from ewc_plots.style import COLOURS, DASHES, WIDTH

NAMES = ("blue", "vermilion", "green", "purple", "orange", "black")


def tasks_seen(
    averages: Mapping[str, Sequence[Interval]], ceiling: Interval, recorded: Mapping[str, Sequence[float]]
) -> Figure:
    """Average accuracy over the tasks seen, an interval a number of tasks; joint training on all as a band.

    `recorded` are means of recorded runs, drawn thin; empty where there are none.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 3.7))
    count = len(next(iter(averages.values())))
    axis.axhspan(ceiling.low, ceiling.high, color=COLOURS["grey"], alpha=0.3, linewidth=0)
    axis.text(count, ceiling.low - 0.006, "all tasks at once", color=COLOURS["grey"], ha="right", va="top", fontsize=9)
    for (name, points), shift in zip(averages.items(), (-0.06, 0.06, 0.0), strict=False):
        colour, dash, marker = LOOK[name]
        at = np.arange(1, count + 1) + shift
        axis.errorbar(at, [p.mean for p in points], [p.half for p in points], color=colour, linestyle=dash,
                      marker=marker, markersize=4, capsize=2, label=name)  # fmt: skip
        if name in recorded:
            axis.plot(np.arange(1, len(recorded[name]) + 1), recorded[name], color=colour, linestyle=dash,
                      linewidth=0.9, alpha=0.6)  # fmt: skip
    axis.set(
        xlabel="tasks learned",
        ylabel="test accuracy, average over them",
        xticks=range(1, max([count, *map(len, recorded.values())]) + 1),
    )
    axis.legend(loc="lower left")
    return figure


def search(grids: Mapping[str, Sequence[Cell]], epochs: Sequence[Cell]) -> Figure:
    """Average validation accuracy against the strength, a line a learning rate and width; against epochs at right."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.2), sharey=True, width_ratios=(2, 1))
    for cell, name, dash, marker in zip(grids["EWC"], NAMES, DASHES, "osD^vP", strict=False):
        rows = [sum(row) / len(row) for row in cell.chosen.validation]
        left.plot(cell.chosen.strengths, rows, color=COLOURS[name], linestyle=dash, marker=marker, markersize=4,
                  label=f"rate {cell.rate:g}, width {cell.width}")  # fmt: skip
    left.set(xscale="log", xlabel="strength λ of EWC", ylabel="validation accuracy,\naverage over the tasks")
    left.set_xticks(grids["EWC"][0].chosen.strengths, [f"{s:g}" for s in grids["EWC"][0].chosen.strengths])
    left.minorticks_off()
    left.legend(loc="best", fontsize=8)
    right.plot([cell.epochs for cell in epochs], [cell.best for cell in epochs], color=COLOURS["black"], marker="s")
    right.set(xlabel="epochs a task", xticks=[cell.epochs for cell in epochs])
    return figure


def by_depth(overlaps: Mapping[int, Sequence[Interval]]) -> Figure:
    """Overlap of two tasks' Fishers against the layer, a line a size of the permuted square, with intervals."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    looks = (("blue", "-", "o"), ("vermilion", "--", "D"))
    for (side, points), (name, dash, marker) in zip(overlaps.items(), looks, strict=False):
        at = np.arange(1, len(points) + 1)
        axis.errorbar(at, [p.mean for p in points], [p.half for p in points], color=COLOURS[name], linestyle=dash,
                      marker=marker, markersize=5, capsize=3, label=f"central {side} × {side} permuted")  # fmt: skip
    count = len(points)
    axis.set(ylabel="overlap of the Fishers", ylim=(0, 1.03), xlim=(0.7, count + 0.3))
    axis.set_xticks(at, ["input", *map(str, range(2, count)), "output"])
    axis.set_xlabel("layer")
    axis.legend(loc="lower right")
    return figure
