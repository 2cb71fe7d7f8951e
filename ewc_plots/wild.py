"""Figures of the chapter "Fisher in the wild"."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from ewc_code.metrics import Interval
from ewc_plots.style import COLOURS, DASHES, GREY_ZEROS, WIDTH

NAMES = ("blue", "vermilion", "green", "purple", "orange", "black", "sky", "grey")


def multiples(ratios: Mapping[str, float]) -> Figure:
    """Traces as multiples of the exact one, a row an estimate, on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.34 * len(ratios) + 0.8))
    rows = np.arange(len(ratios))[::-1]
    axis.axvline(1, color=COLOURS["grey"], linewidth=1.2)
    axis.hlines(rows, 1, list(ratios.values()), color=COLOURS["sky"], linewidth=2, linestyle="-")
    axis.plot(list(ratios.values()), rows, "o", color=COLOURS["blue"], linestyle="none")
    axis.set(xscale="log", yticks=rows, yticklabels=list(ratios), xlabel="trace, as a multiple of the exact Fisher's")
    return figure


def apart(
    steps: Sequence[int], ratios: Mapping[str, Tensor], cosines: Mapping[str, Tensor], names: Sequence[str]
) -> Figure:
    """Trace over exact (top) and cosine to exact (below), a column a layer; (seeds, looks, layers) each."""
    figure, panels = plt.subplots(2, len(names), figsize=(WIDTH, 5.2), sharex=True, sharey="row")
    at = np.asarray(steps) + 1
    for row, values in zip(panels, (ratios, cosines), strict=True):
        for (label, found), name, dash in zip(values.items(), NAMES, cycle(DASHES), strict=False):
            for j, axis in enumerate(row):
                axis.plot(at, found[:, :, j].T, color=COLOURS[name], alpha=0.3, linewidth=0.7, linestyle=dash)
                axis.plot(at, found[:, :, j].mean(0), color=COLOURS[name], linestyle=dash, label=label)
    for axis, name in zip(panels[0], names, strict=True):
        axis.axhline(1, color=COLOURS["grey"], linewidth=0.8, linestyle="-")
        axis.set(title=name, yscale="log")
    panels[0, 0].set_ylabel("trace / exact trace")
    panels[1, 0].set(ylabel="cosine to the exact", xscale="log")
    figure.supxlabel("optimiser steps + 1", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def first_layer(maps: Mapping[str, Tensor], decades: float = 3.0) -> Figure:
    """Mean over hidden units for each pixel, (784,) each, divided by its own largest; log scale, zeros in grey."""
    figure, panels = plt.subplots(1, len(maps), figsize=(WIDTH, 1.9))
    for axis, (title, values) in zip(panels, maps.items(), strict=True):
        shown = np.ma.masked_equal((values / values.max()).reshape(28, 28).cpu().numpy(), 0)
        picture = axis.imshow(shown, cmap=GREY_ZEROS, norm=LogNorm(10**-decades, 1))
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    figure.colorbar(picture, ax=panels, shrink=0.8, label="share of the largest")
    return figure


def subset(counts: Sequence[int], errors: Mapping[str, Tensor], predicted: Mapping[str, Tensor]) -> Figure:
    """Relative error from n examples: each choice (repeats, counts), and the mean of its own standard error."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    for (label, found), name, marker, shift in zip(errors.items(), NAMES, "os", (0.97, 1.03), strict=False):
        at = shift * np.asarray(counts)
        axis.plot(at, found.T, marker, color=COLOURS[name], alpha=0.35, markersize=3.5, linestyle="none")
        axis.plot(at, predicted[label], color=COLOURS[name], linestyle="-" if marker == "o" else "--", label=label)
    axis.set(xscale="log", yscale="log", xlabel="examples", ylabel="relative error of the diagonal")
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.legend(title="line: standard error; mark: error")
    return figure


def common_and_own(common: Mapping[str, Interval], own: Mapping[str, Interval], plain: float) -> Figure:
    """Accuracy at the common strength and at each estimate's own, with intervals; a dotted line without penalty."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.42 * len(common) + 1.1))
    rows = np.arange(len(common))[::-1]
    looks = ((common, "vermilion", "o", -0.13, "common strength"), (own, "blue", "D", 0.13, "own best strength"))
    for found, name, marker, shift, label in looks:
        axis.errorbar([v.mean for v in found.values()], rows + shift, xerr=[v.half for v in found.values()],
                      color=COLOURS[name], marker=marker, linestyle="none", capsize=3, label=label)  # fmt: skip
    axis.axvline(plain, color=COLOURS["grey"], linestyle=":", label="no penalty")
    axis.set(yticks=rows, yticklabels=list(common), xlabel="test accuracy after both tasks, average")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=3)
    return figure
