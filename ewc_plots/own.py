"""Figures of the chapter "Your own model"."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ewc_code.metrics import interval
from ewc_experiments.language import Life
from ewc_experiments.own import Comparison
from ewc_plots.style import COLOURS, WIDTH

LINES = {
    "L2": (COLOURS["orange"], ":", "s"),
    "EWC": (COLOURS["blue"], "-", "D"),
    "replay": (COLOURS["green"], "--", "^"),
}
MARKS = {
    "plain": (COLOURS["vermilion"], "o"),
    "LoRA": (COLOURS["purple"], "P"),
    "EWC, own words": (COLOURS["sky"], "v"),
    "EWC, few": (COLOURS["black"], "x"),
}


def two_tasks(found: Comparison, methods: Sequence[str], names: tuple[str, str]) -> Figure:
    """Test accuracy on the old and the new task after both, a row a way of training, mean over seeds with intervals."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.42 * len(methods) + 1.3))
    rows = np.arange(len(methods))[::-1]
    looks = (("blue", "D", f"{names[0]}, the old task"), ("vermilion", "o", f"{names[1]}, the new one"))
    for which, (colour, marker, label) in enumerate(looks):
        values = [found.interval(method, which) for method in methods]
        axis.errorbar(
            [v.mean for v in values], rows + 0.12 - 0.24 * which, xerr=[v.half for v in values], color=COLOURS[colour],
            marker=marker, markersize=5, capsize=2, linestyle="none", label=label,
        )  # fmt: skip
    before = interval([story.before for story in found.stories])
    axis.axvline(before.mean, color=COLOURS["grey"], linestyle="--", label="old task before the new one")
    axis.set(yticks=rows, yticklabels=list(methods), xlim=(0, 1.02), xlabel="test accuracy after both tasks")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def traded(lives: Sequence[Life]) -> Figure:
    """Bits a character on the first text against those on the second: a line a method through its strengths."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.2))

    def points(method: str, strengths: Sequence[float]) -> np.ndarray:
        found = [[life.later[method][s] for life in lives] for s in strengths]
        return np.array([[(r.English, r.Python) for r in row] for row in found]).mean(1)  # (strengths, 2)

    first = np.mean([(life.first.English, life.first.Python) for life in lives], axis=0)
    plain = points("plain", list(lives[0].later["plain"]))
    for method, (colour, dash, marker) in LINES.items():
        line = np.concatenate([plain, points(method, sorted(lives[0].later[method])), first[None]])
        axis.plot(*line.T, color=colour, linestyle=dash, marker=marker, markersize=5, label=method)
    for method, (colour, marker) in MARKS.items():
        found = [next(iter(life.later[method].values())) for life in lives]
        x, y = interval([r.English for r in found]), interval([r.Python for r in found])
        axis.errorbar(x.mean, y.mean, color=colour, marker=marker, markersize=8, linestyle="none", label=method)
    axis.plot(*first, color=COLOURS["grey"], marker="*", markersize=12, linestyle="none", label="before English")
    axis.set(xlabel="bits a character, English (new)", ylabel="bits a character, Python (old)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def protected(lives: Sequence[Life]) -> Figure:
    """The Fisher by part of the network: share of its trace, and mean of a parameter's entry over that of all."""
    parts = list(lives[0].shares)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.33 * len(parts) + 1.2), sharey=True)
    rows = np.arange(len(parts))[::-1]
    looks: tuple[tuple[str, str, str], ...] = (
        ("shares", "share of the trace", "blue"),
        ("each", "mean entry over that of all", "vermilion"),
    )
    for axis, (what, label, colour) in zip(axes, looks, strict=True):
        found = [interval([getattr(life, what)[part] for life in lives]) for part in parts]
        axis.errorbar(
            [v.mean for v in found], rows, xerr=[v.half for v in found], color=COLOURS[colour],
            marker="D" if what == "shares" else "o", markersize=5, capsize=2, linestyle="none",
        )  # fmt: skip
        axis.set(xlabel=label)
    axes[0].set(yticks=rows, yticklabels=parts, xlim=(-0.01, None))
    axes[1].set(xscale="log")
    axes[1].axvline(1, color=COLOURS["grey"], linestyle=":")
    return figure
