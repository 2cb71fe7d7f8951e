"""Figures of the chapter "Beyond the diagonal"."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from ewc_code.metrics import Interval
from ewc_experiments.beyond import Merged, Sequenced
from ewc_plots.style import COLOURS, DASHES, WIDTH

LOOK = {
    "EWC": ("blue", "-", "D"),
    "diagonal": ("blue", "-", "D"),
    "Kronecker": ("vermilion", "--", "o"),
    "layers": ("black", ":", "s"),
    "full": ("grey", "-", "|"),
    "SI": ("green", "-.", "^"),
    "MAS": ("purple", DASHES[4], "v"),
    "RWalk": ("orange", DASHES[5], "P"),
}


def two_starts(
    mesh: tuple[np.ndarray, np.ndarray],
    levels: Mapping[str, np.ndarray],
    paths: Mapping[str, np.ndarray],
    height: float,
) -> Figure:
    """One level line of a quadratic loss and of each belief about it, and the paths that were taken to its minimum.

    `levels` are heights over the mesh, `paths` (n, 2) by name, from their start; `height` is the level that is drawn.
    """
    figure, axis = plt.subplots(figsize=(WIDTH, 4.3))
    looks = (("black", "-", 2.2), ("blue", "--", 1.8), ("green", "-.", 1.8), ("orange", ":", 2.4))
    handles = []
    for (_, values), (colour, dash, width) in zip(levels.items(), looks, strict=False):
        drawn = axis.contour(*mesh, values, [height], colors=[COLOURS[colour]], linestyles=[dash], linewidths=width)
        handles += drawn.legend_elements()[0]
    for points, (_, (colour, _, _)) in zip(paths.values(), list(enumerate(looks))[2:], strict=False):
        axis.plot(*points.T, color=COLOURS[colour], linewidth=1, linestyle="-", alpha=0.8)
        axis.plot(*points[0], marker="o", markersize=6, color=COLOURS[colour])
    axis.plot(0, 0, "x", color=COLOURS["black"], markersize=8)
    axis.set(xlabel=r"displacement of $\theta_1$", ylabel=r"displacement of $\theta_2$", aspect="equal")
    figure.legend(handles, list(levels), loc="outside upper center", ncols=len(levels))
    return figure


def rises(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """What each belief predicts for a step, as a multiple of the true rise: a row a direction, logarithmic."""
    directions = list(next(iter(shares.values())))
    figure, axis = plt.subplots(figsize=(WIDTH, 0.52 * len(directions) + 1.3))
    rows = np.arange(len(directions))[::-1]
    axis.axvline(1, color=COLOURS["grey"], linewidth=1.2)
    shifts = np.linspace(0.26, -0.26, len(shares))
    for (name, found), shift in zip(shares.items(), shifts, strict=True):
        colour, _, marker = LOOK[name]
        size = 11 if marker == "|" else 6
        axis.plot(list(found.values()), rows + shift, marker, color=COLOURS[colour], linestyle="none", markersize=size,
                  markeredgewidth=2.2 if marker == "|" else 1, label=name)  # fmt: skip
    for row in rows[:-1]:
        axis.axhline(row - 0.5, color=COLOURS["grey"], linewidth=0.4, linestyle="-")
    axis.set(xscale="log", yticks=rows, yticklabels=directions, xlabel="predicted rise / true rise")
    axis.grid(axis="y", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=min(4, len(shares)))
    return figure


def merge_errors(found: Merged) -> Figure:
    """Distance of one product from the sum of the tasks' products, against their number: a panel a layer."""
    figure, panels = plt.subplots(1, len(found.sizes), figsize=(WIDTH, 3.1), sharey=True)
    looks = (("vermilion", "-", "o"), ("black", ":", "s"), ("blue", "--", "D"), ("green", "-.", "^"))
    hollow = {"s": 8, "^": 9}  # they lie on the marks of another rule
    for axis, (layer, (outputs, inputs)) in zip(panels, found.sizes.items(), strict=True):
        for (rule, by_layer), (colour, dash, marker) in zip(found.distances.items(), looks, strict=True):
            values = by_layer[layer]
            filled = "none" if marker in hollow else COLOURS[colour]
            axis.plot(range(2, len(values) + 2), values, color=COLOURS[colour], linestyle=dash, marker=marker,
                      markersize=hollow.get(marker, 4), markerfacecolor=filled, label=rule)  # fmt: skip
        axis.set(yscale="log", xlabel="tasks", title=f"{outputs} × {inputs}")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("distance from the sum")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def against_fisher(points: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Importances against the Fisher on logarithmic axes, a panel each, with lines of slope 1 and 1/2 to compare."""
    figure, panels = plt.subplots(1, len(points), figsize=(WIDTH, 3.2))
    for i, (axis, (title, (x, y))) in enumerate(zip(panels, points.items(), strict=True)):
        fisher, value = np.asarray(x), np.asarray(y)
        axis.plot(fisher, value, ".", color=COLOURS["sky"], markersize=2.5, alpha=0.5, linestyle="none")
        ends = np.quantile(fisher, [0.02, 0.98])
        for slope, colour, dash in ((1, "vermilion", "--"), (0.5, "black", "-")):
            line = np.median(value) + slope * (ends - np.median(fisher))
            label = {1: "slope 1: the Fisher", 0.5: "slope ½: its root"}[slope] if i == 0 else None
            axis.plot(ends, line, color=COLOURS[colour], linestyle=dash, linewidth=1.6, label=label)
        middle, half = np.median(value), 1.15 * (np.quantile(value, 0.99) - np.quantile(value, 0.01)) / 2
        axis.set(title=title, xlabel="log₁₀ Fisher", ylim=(middle - half - 0.6, middle + half + 0.6))
    panels[0].set_ylabel("log₁₀ importance")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def strengths_tried(found: Sequenced) -> Figure:
    """Validation accuracy averaged over the tasks against the strength: a panel a number of tasks, a line a method."""
    counts = list(next(iter(found.validation.values())))
    figure, panels = plt.subplots(1, len(counts), figsize=(WIDTH, 3.4), sharey=True, squeeze=False)
    for axis, count in zip(panels[0], counts, strict=True):
        for name, tried in found.strengths.items():
            colour, dash, marker = LOOK[name]
            values = found.validation[name][count]
            axis.plot(tried, values, color=COLOURS[colour], linestyle=dash, marker=marker, markersize=4, label=name)
            best = tried.index(found.chosen[name][count])
            axis.plot(tried[best], values[best], "o", markersize=11, markerfacecolor="none", color=COLOURS[colour])
        axis.set(xscale="log", xlabel="strength λ", title=f"{count} tasks")
        axis.xaxis.set_minor_formatter(NullFormatter())
    panels[0, 0].set_ylabel("validation accuracy,\naverage over the tasks")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(found.strengths))
    return figure


def method_averages(averages: Mapping[int, Mapping[str, Interval]]) -> Figure:
    """Test accuracy averaged over the tasks with intervals, a row a method, a panel a number of tasks."""
    figure, panels = plt.subplots(
        1, len(averages), figsize=(WIDTH, 0.36 * max(map(len, averages.values())) + 1.1), sharey=True, squeeze=False
    )
    names = max(averages.values(), key=len)
    rows = dict(zip(names, np.arange(len(names))[::-1], strict=True))
    for axis, (count, found) in zip(panels[0], averages.items(), strict=True):
        for name, value in found.items():
            colour, _, marker = LOOK.get(name, ("grey", "-", "s"))
            axis.errorbar(value.mean, rows[name], xerr=value.half, color=COLOURS[colour], marker=marker, capsize=3)
        axis.set(xlabel="test accuracy", title=f"{count} tasks")
        axis.xaxis.set_major_locator(MaxNLocator(4))
    panels[0, 0].set_yticks(list(rows.values()), list(rows))
    return figure
