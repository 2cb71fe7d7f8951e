"""Figures of the chapter "Where it fails"."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ewc_code.metrics import Interval, interval
from ewc_experiments.scenarios import Diagnosis, Entry, Watched
from ewc_plots.style import COLOURS, DASHES, WIDTH

LOOK = {
    "plain": (COLOURS["vermilion"], ":", "o"),
    "EWC": (COLOURS["blue"], "-", "D"),
    "LwF": (COLOURS["purple"], (0, (5, 1, 1, 1)), "^"),
    "replay": (COLOURS["green"], "--", "s"),
    "joint": (COLOURS["grey"], "-.", "v"),
}
SPARE = (COLOURS["orange"], (0, (1, 1)), "P")


def scenario_rows(tables: Mapping[str, Mapping[str, Mapping[str, Entry]]], classes: int = 10) -> Figure:
    """Average accuracy with intervals: a panel a scenario, a row a method, a mark a data set; guessing is dotted."""
    scenarios = list(next(iter(tables.values())))
    methods = list(next(iter(tables.values()))[scenarios[0]])
    figure, axes = plt.subplots(1, len(scenarios), figsize=(WIDTH, 0.36 * len(methods) + 1.3), sharey=True)
    rows = np.arange(len(methods))[::-1]
    looks = (("blue", "D", 0.14), ("vermilion", "o", -0.14))
    for axis, scenario in zip(axes, scenarios, strict=True):
        for (name, table), (colour, marker, shift) in zip(tables.items(), looks, strict=False):
            found = [table[scenario][method].summary() for method in methods]
            axis.errorbar(
                [v.mean for v in found], rows + shift, xerr=[v.half for v in found], color=COLOURS[colour],
                marker=marker, markersize=5, capsize=2, linestyle="none", label=name,
            )  # fmt: skip
        axis.axvline(1 / classes if scenario == "class" else 0.5, color=COLOURS["grey"], linestyle=":")
        axis.set(title=f"{scenario}-incremental", xlim=(0 if scenario == "class" else 0.45, 1.02))
    axes[0].set_yticks(rows, methods)
    figure.supxlabel("average test accuracy after the last task", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def drift(watched: Mapping[str, Sequence[Watched]], switches: Sequence[int] = ()) -> Figure:
    """Images of the first task while the second is learned: put into other classes, and right within their own."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.1), sharex=True)
    titles = ("called another digit than 0 or 1", "right, if only its own classes may be answered")
    for axis, what, title in zip(axes, ("lost", "within"), titles, strict=True):
        for name, runs in watched.items():
            _band(axis, runs[0].steps, [getattr(run, what) for run in runs], name)
        for step in switches:
            axis.axvline(step, color=COLOURS["grey"], linewidth=1, linestyle="-")
        axis.set(title=title, ylim=(-0.02, 1.02), xlabel="steps since the first switch")
    axes[0].set_ylabel("share of the first task's images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(watched))
    return figure


def diagnoses(found: Mapping[str, Sequence[Diagnosis]]) -> Figure:
    """Accuracy of networks that learned class by class, a row a method: as they are, and with the output mended."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.75 * len(found) + 1.3))
    rows = np.arange(len(found))[::-1]
    looks = (
        ("accuracy", "as it is", "vermilion", "o"),
        ("shifted", "one number a task added", "orange", "s"),
        ("refitted", "last layer fitted anew", "green", "^"),
        ("within", "own task's classes only", "blue", "D"),
    )
    for k, (what, label, colour, marker) in enumerate(looks):
        values = [interval([getattr(run, what) for run in runs]) for runs in found.values()]
        axis.errorbar(
            [v.mean for v in values], rows + 0.24 - 0.16 * k, xerr=[v.half for v in values], color=COLOURS[colour],
            marker=marker, markersize=5, capsize=2, linestyle="none", label=label,
        )  # fmt: skip
    axis.set(yticks=rows, yticklabels=list(found), xlim=(0, 1.02), xlabel="accuracy over all tasks' test images")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def buffer_sizes(sizes: Mapping[int, Interval], levels: Mapping[str, Interval], equal: float) -> Figure:
    """Accuracy against examples kept a task; level lines for other methods; where memory equals EWC's is marked."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.1))
    found = list(sizes.values())
    axis.errorbar(
        list(sizes), [v.mean for v in found], [v.half for v in found], color=LOOK["replay"][0],
        linestyle=LOOK["replay"][1], marker=LOOK["replay"][2], capsize=3, label="replay",
    )  # fmt: skip
    for name, level in levels.items():
        colour, dash, _ = LOOK.get(name, SPARE)
        axis.axhline(level.mean, color=colour, linestyle=dash, label=name)
        axis.axhspan(level.low, level.high, color=colour, alpha=0.12, linewidth=0)
    axis.axvline(equal, color=COLOURS["black"], linewidth=1, linestyle=(0, (1, 3)), label="as many numbers as EWC")
    axis.set(xscale="log", ylim=(0, 1.02), xlabel="examples kept of each task", ylabel="class-incremental accuracy")
    ticks = list(sizes)
    axis.set_xticks(ticks, [str(size) for size in ticks])
    axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(levels) + 2)
    return figure


def gap(watched: Mapping[str, Sequence[Watched]], switches: Sequence[int]) -> Figure:
    """Accuracy on the first task at every step of the later ones, mean over seeds with its interval."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.3))
    for name, runs in watched.items():
        _band(axis, runs[0].steps, [run.accuracy for run in runs], name)
    for step in switches:
        axis.axvline(step, color=COLOURS["grey"], linewidth=1, linestyle="-")
    axis.set(
        xlabel="steps since the first task ended; grey lines: the next task begins",
        ylabel="accuracy on task 1",
        ylim=(0, 1),
    )
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(watched))
    return figure


def valley(times: np.ndarray, rises: Mapping[str, np.ndarray]) -> Figure:
    """The old task's loss along a path of steepest descent, a line a choice."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9))
    colours = (COLOURS[name] for name in ("vermilion", "blue", "green", "black"))
    for (label, values), colour, dash in zip(rises.items(), colours, DASHES, strict=False):
        axis.plot(times, values, color=colour, linestyle=dash, label=label)
    axis.set(xlabel="time of descent, times h", ylabel="loss of the old task, units of h", ylim=(0, None))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def _band(axis: Axes, steps: Sequence[int], rows: Sequence[Sequence[float]], name: str) -> None:
    colour, dash, _ = LOOK.get(name, SPARE)
    points = [interval(values) for values in zip(*rows, strict=True)]
    mean, half = np.array([p.mean for p in points]), np.array([p.half for p in points])
    axis.plot(steps, mean, color=colour, linestyle=dash, label=name)
    axis.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
