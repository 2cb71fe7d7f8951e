"""Figures about learning one task after another."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ewc_code.data import Images
from ewc_code.metrics import interval
from ewc_code.training import Record
from ewc_experiments.comparison import Chosen
from ewc_experiments.plane import Plane
from ewc_plots.style import COLOURS, DASHES, WIDTH

LOOK = {
    "plain": (COLOURS["vermilion"], ":", "o"),
    "L2": (COLOURS["green"], "--", "s"),
    "EWC": (COLOURS["blue"], "-", "D"),
    "EWC, full": (COLOURS["purple"], (0, (5, 1, 1, 1)), "^"),
    "joint": (COLOURS["grey"], "-.", "v"),
    "dropout": (COLOURS["orange"], "--", "s"),
    "as in the tutorial": (COLOURS["orange"], "-.", "^"),
}
SPARE = (COLOURS["black"], "-", "o")
LABELS = {
    "MNIST": tuple("0123456789"),
    "FashionMNIST": ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                     "ankle boot"),
}  # fmt: skip


def image_rows(sets: Sequence[Images], count: int = 10) -> Figure:
    """One training image of each class, a row a data set, with the class's name above it."""
    figure, axes = plt.subplots(len(sets), count, figsize=(WIDTH, 1.0 * len(sets)), squeeze=False)
    for row, images in zip(axes, sets, strict=True):
        labels = images.train.y.cpu().numpy()
        for label, axis in enumerate(row):
            pixels = images.train.x[int(np.flatnonzero(labels == label)[0])].cpu().numpy()
            axis.imshow(pixels.reshape(28, 28), cmap="gray_r")
            axis.set_title(LABELS[images.name][label], fontsize=8, loc="center")
            axis.set_axis_off()
    return figure


def curves(records: Mapping[str, Sequence[Record]], switches: Sequence[int], height: float = 2.1) -> Figure:
    """Test accuracy on each task while all are learned: a panel a task, a line a method, a band its 95 % interval.

    `records` by method, one a seed, with the same steps; `switches` steps at which a task begins; `height` in inches.
    """
    names = next(iter(records.values()))[0].names
    figure, axes = plt.subplots(len(names), 1, figsize=(WIDTH, height * len(names)), sharex=True, squeeze=False)
    for j, (name, axis) in enumerate(zip(names, axes[:, 0], strict=True)):
        for method, runs in records.items():
            colour, dash, _ = LOOK.get(method, SPARE)
            points = [interval([run.curves[i][j] for run in runs]) for i in range(len(runs[0].steps))]
            mean, half = np.array([p.mean for p in points]), np.array([p.half for p in points])
            axis.plot(runs[0].steps, mean, color=colour, linestyle=dash, label=method)
            axis.fill_between(runs[0].steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
        for step in switches:
            axis.axvline(step, color=COLOURS["grey"], linewidth=1, linestyle="-")
        axis.set(ylabel="accuracy", ylim=(0, 1.02), xlim=(0, runs[0].steps[-1]), title=f"on {name}")
        bounds = [0, *switches, runs[0].steps[-1]]
        axis.axvspan(bounds[j], bounds[j + 1], color=COLOURS["grey"], alpha=0.12, linewidth=0)
    axes[-1, 0].set_xlabel("optimiser steps; the shaded stretch is where the panel's own task is trained")
    if len(records) > 1:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=len(records))
    return figure


def before_after(
    groups: Mapping[int, Sequence[Record]] | Mapping[float, Sequence[Record]],
    xlabel: str,
    title: str = "on the first task",
    log: bool = False,
) -> Figure:
    """Accuracy on the first task right after it and after the second, against the number that the groups differ in."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9))
    at = np.array(list(groups), dtype=float)
    looks = (("right after learning it", "blue", "D", "-"), ("after the second task", "vermilion", "o", "--"))
    for row, (label, colour, marker, dash) in enumerate(looks):
        points = [interval([run.accuracy[row][0] for run in runs]) for runs in groups.values()]
        axis.errorbar(
            at, [p.mean for p in points], [p.half for p in points],
            color=COLOURS[colour], marker=marker, markersize=5, capsize=3, linestyle=dash, label=label,
        )  # fmt: skip
    axis.set(xlabel=xlabel, ylabel="accuracy", ylim=(0, 1.02), xscale="log" if log else "linear", title=title)
    axis.set_xticks(at, [f"{g:g}" for g in groups])
    axis.minorticks_off()
    axis.legend(loc="best")
    return figure


def strengths(chosen: Sequence[Chosen], names: Sequence[str]) -> Figure:
    """Validation accuracy on each task against the strength, a panel a method; the chosen strength is marked."""
    figure, axes = plt.subplots(1, len(chosen), figsize=(WIDTH, 3.0), sharey=True, squeeze=False)
    for axis, picked in zip(axes[0], chosen, strict=True):
        table = np.array(picked.validation)  # (strengths, tasks)
        for name, values, colour, dash in zip(names, table.T, COLOURS.values(), DASHES, strict=False):
            axis.plot(picked.strengths, values, color=colour, linestyle=dash, marker="o", markersize=4, label=name)
        axis.plot(picked.strengths, table.mean(1), color=COLOURS["black"], linestyle="-", linewidth=1, label="average")
        axis.axvline(picked.best, color=COLOURS["grey"], linewidth=4, alpha=0.35)
        axis.set(xscale="log", xlabel=f"strength λ of {picked.method}", ylim=(0, 1.02), title=picked.method)
    axes[0, 0].set_ylabel("validation accuracy\nafter the last task")
    axes[0, -1].legend(loc="lower left")
    return figure


def ladder(rungs: Mapping[str, Sequence[Record]]) -> Figure:
    """Final accuracy on both tasks, a row a repair, with 95 % intervals over seeds and each seed's own dot."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.5 * len(rungs) + 1.1))
    rows = np.arange(len(rungs))[::-1]
    names = next(iter(rungs.values()))[0].names
    for j, (colour, marker, shift) in enumerate((("blue", "D", 0.12), ("vermilion", "o", -0.12))):
        for row, runs in zip(rows, rungs.values(), strict=True):
            values = [run.accuracy[-1][j] for run in runs]
            found = interval(values)
            axis.plot(values, np.full(len(values), row + shift), ".", color=COLOURS[colour], alpha=0.4, markersize=5)
            axis.errorbar(found.mean, row + shift, xerr=found.half, fmt=marker, color=COLOURS[colour], capsize=3)
    handles = [Line2D([], [], color=COLOURS[c], marker=m, linestyle="") for c, m in (("blue", "D"), ("vermilion", "o"))]
    axis.set(yticks=rows, yticklabels=list(rungs), xlabel="test accuracy after both tasks", xlim=(0, 1))
    figure.legend(handles, names, loc="outside upper right", ncols=2)
    return figure


def regions(axis: Axes, plane: Plane) -> list[tuple[list[np.ndarray], list[list[np.ndarray]]]]:
    """Draw both tasks' regions of low loss, two higher levels around each, and the optima.

    Returns for each task the outlines of its region, closed, and by level the lines drawn, all as points (m, 2).
    """
    drawn = []
    for (colour, values), (x, y) in zip(
        (("sky", plane.losses[0]), ("orange", plane.losses[1])), plane.modes, strict=True
    ):
        loss = np.array(values)
        levels = loss.min() + plane.setup.tolerance * np.array([1, 4, 12])
        low = axis.contourf(*plane.axes, loss, [0, levels[0]], colors=[COLOURS[colour]], alpha=0.35)
        lines = axis.contour(
            *plane.axes, loss, levels, colors=[COLOURS[colour]], linewidths=[1.6, 0.8, 0.8], linestyles="-"
        )
        axis.plot(x, y, "o", color=COLOURS["black"], markersize=6, zorder=5)
        outlines = [np.asarray(outline) for path in low.get_paths() for outline in path.to_polygons()]
        drawn.append((outlines, lines.allsegs))
    return drawn


def figure_one(plane: Plane, show: Sequence[str] = ("plain", "L2", "EWC", "EWC, full")) -> Figure:
    """Regions of low loss of two tasks in the plane of two parameters, and each method's path from task A's optimum."""
    figure, axis = plt.subplots(figsize=(WIDTH, 5.4))
    w1, w2 = plane.axes
    regions(axis, plane)
    for label, (x, y) in zip("AB", plane.modes, strict=True):
        axis.annotate(f"optimum of {label}", (x, y), (0, 9), textcoords="offset points", fontsize=9, ha="center")
    high = len(w2) * 15 // 16  # A's valley goes up, and B's optimum lies far inside of its own
    top = (w1[int(np.argmin(plane.losses[0][high]))], w2[high])
    for at, text, away in ((top, "A", (12, -18)), (plane.modes[1], "B", (-34, 32))):  # clear of the paths
        axis.annotate(f"low loss of {text}", (at[0], at[1]), away, textcoords="offset points", fontweight="bold",
                      ha="center", alpha=0.75)  # fmt: skip
    for name, width in zip(LOOK, (2.2, 5.5, 2.8, 1.4), strict=False):  # they share their beginning: widest below
        if name not in show:
            continue
        colour, dash, marker = LOOK[name]
        path = np.array(plane.paths[name])
        label = "EWC, full matrix" if name == "EWC, full" else name
        style = (0, (1.2, 0.4)) if name == "L2" else dash
        axis.plot(path[:, 0], path[:, 1], color=colour, linestyle=style, linewidth=width, label=label)
        axis.plot(*path[-1], marker=marker, color=colour, markersize=8, markeredgecolor="white", zorder=6)
    axis.set(xlabel=r"parameter $w_1$", ylabel=r"parameter $w_2$", aspect="equal")
    axis.grid(False)
    figure.legend(loc="outside upper right", ncols=len(show))
    return figure
