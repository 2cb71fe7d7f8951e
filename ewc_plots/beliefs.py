"""Figures of the chapter "Bayes": beliefs that are updated, added up, and cut down to their diagonal."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse

from ewc_code.metrics import Interval
from ewc_plots.style import COLOURS, DASHES, WIDTH

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def arrival(counts: Sequence[int], curves: Curves, tasks: tuple[str, str], joint: tuple[float, float]) -> Figure:
    """Accuracy (0..1) on the old and on the new task against the new examples seen; `joint`: level to compare with."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.1), sharey=True)
    for side, (panel, task) in enumerate(zip(panels, tasks, strict=True)):
        for (name, both), colour, dash in zip(curves.items(), ("blue", "vermilion"), DASHES, strict=False):
            panel.plot(counts, both[side], color=COLOURS[colour], linestyle=dash, marker="o", markersize=3, label=name)
        panel.axhline(joint[side], color=COLOURS["grey"], linewidth=1, linestyle=DASHES[3], zorder=0)
        panel.text(0.98 - 0.96 * side, joint[side] - 0.015, "both tasks at once", color=COLOURS["grey"], va="top",
                   fontsize=8, ha=("right", "left")[side], transform=panel.get_yaxis_transform())  # fmt: skip
        panel.set(xscale="symlog", xlabel=f"{tasks[1]} images seen", title=f"accuracy on {task}", ylim=(0, 1))
        panel.set_xlim(-0.2, 1.4 * counts[-1])
        ticks = [0, *(10**power for power in range(5) if 10**power <= counts[-1])]
        panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panel.minorticks_off()
    panels[0].legend(loc="center right")
    return figure


def updates(theta: np.ndarray, steps: Mapping[str, tuple[np.ndarray, np.ndarray]], orders: tuple[str, str]) -> Figure:
    """One panel a step: the density after it, for two orders of the same data."""
    figure, panels = plt.subplots(1, len(steps), figsize=(WIDTH, 2.5), sharex=True, sharey=True)
    for panel, (title, densities) in zip(panels, steps.items(), strict=True):
        for density, name, colour, dash in zip(densities, orders, ("blue", "orange"), DASHES, strict=False):
            panel.plot(theta, density, color=COLOURS[colour], linestyle=dash, label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xticks([0, 0.5, 1], ["0", "½", "1"])
    panels[0].set(ylabel="density", ylim=(0, None))
    panels[0].legend(loc="upper left", fontsize=8)
    figure.supxlabel(r"$\theta$, probability of a correct answer", fontsize=10)
    return figure


def springs(theta: np.ndarray, energies: Mapping[str, np.ndarray]) -> Figure:
    """Energies (nats) over one parameter, each with its minimum marked and named."""
    figure, panel = plt.subplots(figsize=(WIDTH, 3.0))
    for (name, energy), colour, dash in zip(energies.items(), ("blue", "orange", "black"), DASHES, strict=False):
        lowest = theta[energy.argmin()], energy.min()
        panel.plot(theta, energy, color=COLOURS[colour], linestyle=dash)
        panel.plot(*lowest, "o", color=COLOURS[colour], clip_on=False, zorder=3)
        panel.annotate(name, lowest, (0, 9), textcoords="offset points", ha="center", color=COLOURS[colour])
    panel.set(xlabel=r"$\theta$", ylabel="energy, nats", ylim=(0, 9), xlim=(theta[0], theta[-1]))
    return figure


def valleys(panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], joint: np.ndarray) -> Figure:
    """Gaussians in the plane, name -> (mean, covariance): ellipses of two standard deviations, a cross at `joint`."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.5), sharex=True, sharey=True)
    for axis, (title, beliefs) in zip(axes, panels.items(), strict=True):
        styles = zip(("blue", "orange", "black"), DASHES, strict=False)
        for (name, (mean, covariance)), (colour, dash) in zip(beliefs.items(), styles, strict=True):
            size, basis = np.linalg.eigh(covariance)
            turn = np.degrees(np.arctan2(basis[1, 1], basis[0, 1]))
            width, height = 4 * np.sqrt(size[1]), 4 * np.sqrt(size[0])
            axis.add_patch(Ellipse(tuple(mean), width, height, angle=turn, fill=False, edgecolor=COLOURS[colour],
                                   linestyle=dash, linewidth=1.8, label=name))  # fmt: skip
            axis.plot(*mean, "o", color=COLOURS[colour], markersize=4)
        cross = {"color": COLOURS["vermilion"], "markersize": 9, "markeredgewidth": 2.2}
        axis.plot(*joint, "x", label="both tasks at once", **cross)
        axis.set(title=title, xlabel=r"$\theta_1$ (intercept)", xlim=(-2.8, 1.8), ylim=(-0.7, 3), aspect="equal")
    axes[0].set_ylabel(r"$\theta_2$ (slope)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def kept(rows: Mapping[str, tuple[Interval, Interval]], tasks: tuple[str, str]) -> Figure:
    """A row a belief: accuracy (0..1) on the old and on the new task with their confidence intervals."""
    figure, panel = plt.subplots(figsize=(WIDTH, 0.9 + 0.45 * len(rows)))
    for side, (task, colour, marker) in enumerate(zip(tasks, ("blue", "orange"), "os", strict=True)):
        means, halves = ([getattr(row[side], part) for row in rows.values()] for part in ("mean", "half"))
        panel.errorbar(means, range(len(rows)), xerr=halves, fmt=marker, color=COLOURS[colour], capsize=3, label=task)
    for y, row in enumerate(rows.values()):
        panel.plot([row[0].mean, row[1].mean], [y, y], color=COLOURS["grey"], linewidth=1, linestyle="-", zorder=0)
    panel.set(xlim=(0, 1), xlabel="test accuracy after both tasks", ylim=(len(rows) - 0.5, -0.5))
    panel.set_yticks(range(len(rows)), list(rows))
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def orders(by_order: Mapping[str, Interval], full: Interval) -> Figure:
    """Mean accuracy after all tasks for each order in which they came, sorted, beside that of the full belief."""
    figure, panel = plt.subplots(figsize=(WIDTH, 3.2))
    ranked = sorted(by_order.items(), key=lambda entry: entry[1].mean)
    x = range(len(ranked))
    panel.axhspan(full.low, full.high, color=COLOURS["blue"], alpha=0.25, linewidth=0)
    panel.axhline(full.mean, color=COLOURS["blue"])
    panel.text(0, full.high + 0.008, "whole precision matrix: one level, whatever the order", color=COLOURS["blue"])
    panel.errorbar(x, [e.mean for _, e in ranked], [e.half for _, e in ranked], fmt="s", markersize=4, capsize=2,
                   color=COLOURS["vermilion"])  # fmt: skip
    panel.text(len(ranked) - 1, ranked[-1][1].high + 0.008, "diagonal only", color=COLOURS["vermilion"], ha="right")
    bottom = min(e.low for _, e in ranked) - 0.04
    panel.set(ylabel="mean test accuracy", xlabel="order of the tasks", ylim=(bottom, full.high + 0.06))
    panel.set_xticks(x, [name for name, _ in ranked], rotation=90, family="monospace", fontsize=8)
    return figure
