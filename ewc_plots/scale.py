"""Figures of the chapter "Scale"."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ewc_experiments.scale import Ceilings, Cost, Hardware, Overhead, Point, Stacked
from ewc_plots.style import COLOURS, WIDTH

HATCHES = ("", "///", "...", "xx")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def where_time_goes(profiles: Mapping[str, Mapping[str, float]]) -> Figure:
    """A bar a work, split into the shares of its time by kind."""
    figure, axis = plt.subplots(figsize=(WIDTH, 0.5 * len(profiles) + 1.5))
    kinds, at = list(next(iter(profiles.values()))), np.arange(len(profiles))
    left = np.zeros(len(profiles))
    for kind, colour, hatch in zip(kinds, ("blue", "orange", "sky", "grey"), HATCHES, strict=True):
        shares = np.array([found[kind] / sum(found.values()) for found in profiles.values()])
        axis.barh(at, shares, left=left, color=COLOURS[colour], hatch=hatch, edgecolor="white", label=kind)
        left += shares
    axis.set(yticks=at, yticklabels=list(profiles), xlim=(0, 1), xlabel="share of the time")
    axis.invert_yaxis()
    axis.grid(False, axis="y")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def roofs(measured: Sequence[Ceilings], quoted: Sequence[Ceilings], points: Sequence[Point]) -> Figure:
    """Operations a second against operations a byte: a roof a machine, dashed where it is quoted; a mark a work."""
    figure, axis = plt.subplots(figsize=(WIDTH, 4.6))
    span = np.logspace(-1.2, 3.3, 200)
    solid = zip(measured, ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1))), ("black", "green", "grey", "sky"), strict=False)
    for ceilings, dash, colour in [*solid, *((found, "--", "purple") for found in quoted)]:
        roof = np.minimum(ceilings.peak, ceilings.bandwidth * span)
        axis.plot(span, roof, color=COLOURS[colour], linestyle=dash, label=ceilings.name)
    looks = zip(MARKERS, ("blue", "sky", "green", "vermilion", "orange", "purple"), points, strict=False)
    for marker, colour, point in looks:
        axis.plot(point.intensity, point.operations / point.seconds, marker=marker, color=COLOURS[colour],
                  linestyle="none", markersize=9, markerfacecolor="none", markeredgewidth=1.8,
                  label=point.name)  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=9)
    return figure


def penalty_shares(found: Sequence[Overhead], least: Sequence[float]) -> Figure:
    """What the penalty adds to a step, against the batch size: measured with quartiles, and what the roofline says."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4))
    batches = [o.batch for o in found]
    spans = [[o.ratio - o.low for o in found], [o.high - o.ratio for o in found]]
    axis.errorbar(batches, [o.ratio - 1 for o in found], spans, color=COLOURS["blue"], marker="o", capsize=3,
                  label="autograd, with quartiles")  # fmt: skip
    axis.plot(batches, [o.by_hand - 1 for o in found], color=COLOURS["green"], linestyle="-.", marker="^",
              markersize=5, label="gradient by hand")  # fmt: skip
    axis.plot(batches, least, color=COLOURS["vermilion"], linestyle="--", marker="s", markersize=4,
              label="roofline")  # fmt: skip
    axis.axhline(0, color=COLOURS["grey"], linewidth=1)
    axis.set(xscale="log", xlabel="examples in a batch", ylabel="time added to a step,\nshare of it")
    axis.set_xticks(batches, [f"{b:,}" for b in batches])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def by_stack(found: Sequence[Stacked], fixed: float, each: float) -> Figure:
    """Seconds a model against the models in a stack, with the law fixed / M + each."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    models = np.array([s.models for s in found])
    axis.plot(models, [s.seconds for s in found], color=COLOURS["blue"], marker="o", linestyle="none", label="measured")
    fine = np.geomspace(models[0], models[-1], 50)
    axis.plot(fine, fixed / fine + each, color=COLOURS["vermilion"], linestyle="--", label="a fixed part, shared")
    axis.axhline(each, color=COLOURS["grey"], linestyle=":", label="what remains")
    axis.set(xscale="log", ylim=(0, None), xlabel="models in a stack", ylabel="seconds a model")
    axis.set_xticks(models, [f"{m}" for m in models])
    axis.minorticks_off()
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def memory_needed(rows: Sequence[Cost], machine: Hardware) -> Figure:
    """Bytes kept for each kind of belief against the number of parameters, and one device's memory."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8))
    sizes = [row.parameters for row in rows]
    kinds = (("full", "black", ":", "x"), ("kronecker", "vermilion", "--", "s"), ("diagonal", "blue", "-", "o"))
    names = {"kronecker": "Kronecker"}
    for kind, colour, dash, marker in kinds:
        axis.plot(sizes, [row.memory[kind] for row in rows], color=COLOURS[colour], linestyle=dash, marker=marker,
                  markersize=5, label=names.get(kind, kind))  # fmt: skip
    room = f"one device's {machine.memory / 1e9:.0f} GB"
    axis.axhline(machine.memory, color=COLOURS["grey"], linewidth=1.2, linestyle="-.", label=room)
    axis.set(xscale="log", yscale="log", xlabel="parameters", ylabel="bytes of the belief")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure
