"""Figures of the chapter "Many tasks"."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from ewc_code.metrics import Interval
from ewc_plots.style import COLOURS, DASHES, WIDTH

FIXED = {
    "one penalty": ("blue", "-", "D"),
    "a penalty per task": ("vermilion", "--", "o"),
    "γ = 0.9": ("green", "-.", "s"),
    "γ = 0.7": ("purple", (0, (3, 1)), "^"),
    "γ = 0.5": ("orange", (0, (5, 1, 1, 1, 1, 1)), "v"),
    "plain": ("black", ":", "x"),
}
SPARE = ("sky", (0, (1, 1)), "P")
Means = Mapping[str, Sequence[float] | Tensor]


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, dash and marker of each method, the same in all figures of the chapter."""
    found = {name: FIXED.get(name, SPARE) for name in names}
    return {n: {"color": COLOURS[c], "linestyle": d, "marker": m, "markersize": 4} for n, (c, d, m) in found.items()}


def counted(counts: Means, drift: Means) -> Figure:
    """Left, how often each task counts in the last mode; right, modes after each task when optima move steadily."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.3))
    for name, look in looks(list(counts)).items():
        left.plot(range(1, len(counts[name]) + 1), counts[name], label=name, **look)
        right.plot(range(1, len(drift[name]) + 1), drift[name], **look)
    last = len(next(iter(drift.values())))
    right.plot([1, last], [1, last], color=COLOURS["grey"], linewidth=1, linestyle="-")
    right.text(0.03, 0.97, "grey: the newest task's optimum", color=COLOURS["grey"], fontsize=9, va="top",
               transform=right.transAxes)  # fmt: skip
    left.set(yscale="log", xlabel="task", ylabel="how many times it counts", xticks=_ticks(last))
    right.set(xlabel="tasks learned", ylabel="mode", xticks=_ticks(last))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def from_joint(excess: Means, split: float = 1e-15) -> Figure:
    """Excess of each sequence over joint training after each number of tasks, nats an example, on logarithmic axes.

    What lies below `split` is rounding, and has a panel of its own; an excess of zero is left out.
    """
    figure, (top, below) = plt.subplots(2, 1, figsize=(WIDTH, 4.2), sharex=True, height_ratios=(3.2, 1))
    named = (("blue", "D"), ("vermilion", "o"), ("green", "s"), ("purple", "^"), ("sky", "P"), ("black", "x"))
    for (name, values), (colour, marker), dash in zip(excess.items(), named, DASHES, strict=False):
        at, shown = np.arange(1, len(values) + 1), np.array(values)
        for axis, inside in ((top, shown > split), (below, (shown <= split) & (shown > 0))):
            axis.plot(at[inside], shown[inside], color=COLOURS[colour], marker=marker, linestyle=dash, markersize=4,
                      label=name)  # fmt: skip
    for axis in (top, below):
        axis.set(yscale="log")
    top.set(ylabel="above the joint optimum,\nnats an example")
    below.set(xlabel="tasks learned", ylabel="rounding", ylim=(1e-30, 1e-20), yticks=[1e-30, 1e-25, 1e-20])
    below.set_xticks(_ticks(len(values)))
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def directions(
    paths: Mapping[str, np.ndarray], optima: np.ndarray, precisions: Mapping[str, np.ndarray], counts: Means
) -> Figure:
    """Left, modes after each task in the plane, the tasks' own optima, and what is believed at last; right, counts.

    `paths` (K, 2) by belief, from the first to the last mode; an ellipse is where the energy is 1 nat above its lowest.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.6), width_ratios=(1, 1.05))
    styles = zip((("blue", "-", "D"), ("vermilion", "--", "o")), paths.items(), strict=True)
    left.plot(*optima.T, ".", color=COLOURS["grey"], linestyle="none", label="optima of the tasks")
    for (colour, dash, marker), (name, path) in styles:
        left.plot(*path.T, color=COLOURS[colour], linewidth=0.8, linestyle=dash, alpha=0.6)
        left.plot(*path[-1], marker=marker, color=COLOURS[colour], linestyle="none", label=name)
        size, basis = np.linalg.eigh(np.linalg.inv(precisions[name]))
        turn = np.degrees(np.arctan2(basis[1, 1], basis[0, 1]))
        width, height = 2 * np.sqrt(2 * size[::-1])
        left.add_patch(Ellipse(tuple(path[-1]), width, height, angle=turn, fill=False, edgecolor=COLOURS[colour],
                               linestyle=dash, linewidth=1.6))  # fmt: skip
    left.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", aspect="equal")
    for (name, values), (colour, dash, marker) in zip(
        counts.items(), (("blue", "-", "D"), ("vermilion", "--", "o"), ("green", "-.", "s")), strict=False
    ):
        right.plot(range(1, len(values) + 1), values, color=COLOURS[colour], linestyle=dash, marker=marker,
                   markersize=4, label=name)  # fmt: skip
    right.set(yscale="log", xlabel="task", ylabel="how many times it counts", xticks=_ticks(len(values)))
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=8)
    return figure


def remembered(growth: Means, stiffness: Sequence[float], noisy: Means, decays: Mapping[str, float]) -> Figure:
    """Left, precision in units of one task's after each task, a line a decay; right, tasks remembered by stiffness.

    `noisy` by process noise, at each `stiffness`; `decays` the number of tasks that each decay remembers, the same for
    all.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    for name, look in looks(list(growth)).items():
        left.plot(range(1, len(growth[name]) + 1), growth[name], label=name, **look)
        if name in decays:
            right.axhline(decays[name], color=look["color"], linestyle=look["linestyle"])
    for (name, values), dash in zip(noisy.items(), ("-", (0, (1, 1))), strict=False):
        right.plot(stiffness, values, color=COLOURS["black"], linestyle=dash, label=name)
    left.set(xlabel="tasks learned", ylabel="precision, in tasks", xticks=_ticks(len(next(iter(growth.values())))))
    right.set(xscale="log", yscale="log", xlabel="precision that a task adds", ylabel="tasks remembered")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=9)
    right.legend(loc="upper right", fontsize=8)
    return figure


def by_strength(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> Figure:
    """A panel a number of tasks: average validation accuracy against the strength, a line a method, its best filled."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.3), sharey=True, squeeze=False)
    for axis, (title, methods) in zip(axes[0], panels.items(), strict=True):
        for name, look in looks(list(methods)).items():
            strengths, values = methods[name]
            axis.plot(strengths, values, label=name, **look | {"markerfacecolor": "white"})
            best = int(np.argmax(values))
            axis.plot(strengths[best], values[best], **look | {"markersize": 7})
        axis.set(xscale="log", xlabel="strength λ", title=title)
        tried = sorted({s for strengths, _ in methods.values() for s in strengths})
        axis.set_xticks(tried, [f"{s:g}" for s in tried])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("validation accuracy,\naverage over the tasks")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def sequence(averages: Mapping[str, Sequence[Interval]], ceilings: Mapping[int, Interval]) -> Figure:
    """Average test accuracy over the tasks seen, with intervals; joint training marked where it was done."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8))
    for shift, (name, look) in zip(np.linspace(-0.12, 0.12, len(averages)), looks(list(averages)).items(), strict=True):
        _intervals(axis, np.arange(1, len(averages[name]) + 1) + shift, averages[name], look, name)
    axis.errorbar(list(ceilings), [c.mean for c in ceilings.values()], [c.half for c in ceilings.values()],
                  color=COLOURS["grey"], marker="*", markersize=10, linestyle="none", label="all at once")  # fmt: skip
    axis.set(xlabel="tasks learned", ylabel="test accuracy, average over them", ylim=(None, 1))
    axis.set_xticks(_ticks(len(next(iter(averages.values())))))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def by_task(accuracies: Mapping[str, Sequence[Interval]], difference: Sequence[Interval], name: str) -> Figure:
    """Above, accuracy on each task after the last; below, a paired difference of two methods, in points, by task."""
    figure, (top, below) = plt.subplots(2, 1, figsize=(WIDTH, 4.8), sharex=True, height_ratios=(1.5, 1))
    shifts = np.linspace(-0.15, 0.15, len(accuracies))
    for shift, (method, look) in zip(shifts, looks(list(accuracies)).items(), strict=True):
        _intervals(top, np.arange(1, len(accuracies[method]) + 1) + shift, accuracies[method], look, method)
    at = np.arange(1, len(difference) + 1)
    below.axhline(0, color=COLOURS["grey"], linewidth=1, linestyle="-")
    below.errorbar(at, [100 * d.mean for d in difference], [100 * d.half for d in difference], color=COLOURS["black"],
                   marker="s", markersize=4, capsize=2, linestyle="none")  # fmt: skip
    top.set(ylabel="test accuracy after the last task")
    below.set(xlabel="task", ylabel=f"points,\n{name}", xticks=_ticks(len(at)))
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def stiffening(trace: Means, newest: Mapping[str, Sequence[Interval]]) -> Figure:
    """Left, trace of the precision in units of the first task's; right, accuracy on each task right after it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    styles = looks(list(newest))
    for name, values in trace.items():
        left.plot(range(1, len(values) + 1), values, label=name, **styles[name])
    for shift, (name, points) in zip(np.linspace(-0.12, 0.12, len(newest)), newest.items(), strict=True):
        _intervals(right, np.arange(1, len(points) + 1) + shift, points, styles[name], name)
    left.set(xlabel="tasks learned", ylabel="trace of the precision,\nover that of the first task")
    right.set(xlabel="task", ylabel="test accuracy right after it")
    for axis in (left, right):
        axis.set_xticks(_ticks(len(next(iter(newest.values())))))
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _intervals(axis: Axes, at: np.ndarray, points: Sequence[Interval], look: dict[str, Any], label: str) -> None:
    axis.errorbar(
        at, [p.mean for p in points], [p.half for p in points], capsize=2, elinewidth=0.8, label=label, **look
    )


def _ticks(count: int) -> list[int]:
    return list(range(1, count + 1)) if count < 8 else [1, *range(5, count + 1, 5)]
