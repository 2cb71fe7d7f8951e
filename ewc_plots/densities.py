"""Figures of the chapter "Laplace": densities and their Gaussians, errors, evidence, and digits that turn.

A panel is a mapping with `title`, `xlabel`, `x` and what the figure's docstring names, numbers at `x`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ewc_plots.style import COLOURS, DASHES, WIDTH

EXACT = {"color": COLOURS["blue"], "linestyle": "-", "label": "exact"}
GAUSSIAN = {"color": COLOURS["vermilion"], "linestyle": "--", "label": "Laplace"}


def parabolas(panels: Sequence[Mapping]) -> Figure:
    """Above `energy` with its `parabola`, below `density` and `gaussian`; one column a panel."""
    figure, axes = plt.subplots(2, len(panels), figsize=(WIDTH, 4.2), sharex="col")
    for (above, below), panel in zip(axes.T, panels, strict=True):
        above.plot(panel["x"], panel["energy"], **EXACT)
        above.plot(panel["x"], panel["parabola"], **GAUSSIAN)
        above.set(title=panel["title"], ylim=(-0.4, 8))
        below.fill_between(panel["x"], panel["density"], color=COLOURS["blue"], alpha=0.15, linewidth=0)
        below.plot(panel["x"], panel["density"], **EXACT)
        below.plot(panel["x"], panel["gaussian"], **GAUSSIAN)
        below.set(xlabel=panel["xlabel"], ylim=(0, None))
    axes[0, 0].set_ylabel("energy above its\nminimum, nats")
    axes[1, 0].set_ylabel("density")
    axes[0, 0].legend(loc="upper center")
    return figure


def contours(panels: Sequence[Mapping], labels: tuple[str, str] = ("$w_1$", "$w_2$")) -> Figure:
    """Densities on `x` (a,) and `y` (b,): `exact` (b, a) shaded, `gaussian` dashed at equal heights."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.5), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        levels = np.max(panel["exact"]) * np.exp([-4.5, -2.0, -0.5])  # 3, 2 and 1 standard deviations of a Gaussian
        x, y, exact = panel["x"], panel["y"], panel["exact"]
        axis.contourf(x, y, exact, [*levels, 1.001 * np.max(exact)], cmap="Blues", vmin=-levels[1], vmax=levels[2])
        axis.contour(x, y, exact, levels, colors=COLOURS["blue"], linewidths=1.2)
        axis.contour(x, y, panel["gaussian"], levels, colors=COLOURS["vermilion"], linestyles="--")
        axis.set(title=panel["title"], xlabel=labels[0], ylabel=labels[1])
    handles = [plt.Line2D([], [], **EXACT), plt.Line2D([], [], **GAUSSIAN)]
    axes[0, 0].legend(handles=handles, loc="lower right")
    return figure


def rates(n: Sequence[int], errors: Mapping[str, tuple[np.ndarray, float]], xlabel: str = "examples $N$") -> Figure:
    """How errors (seeds, k) fall with n (k,): seeds faint, the mean strong, a line with the expected exponent of n."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.4))
    names = ("blue", "vermilion", "green")
    for (name, (values, slope)), colour, marker in zip(errors.items(), names, "os^", strict=False):
        axis.loglog(n, values.T, color=COLOURS[colour], linestyle="-", linewidth=0.5, alpha=0.35)
        mean = values.mean(0)
        axis.loglog(n, mean, color=COLOURS[colour], linestyle="none", marker=marker, markersize=5)
        guide = mean[-1] * (np.asarray(n) / n[-1]) ** slope
        axis.loglog(n, guide, color=COLOURS[colour], linestyle="--", linewidth=1)
        axis.annotate(name, (n[-1], mean[-1]), (8, 0), textcoords="offset points", color=COLOURS[colour], va="center")
    axis.set(xlabel=xlabel, ylabel="error", xlim=(n[0] / 1.15, n[-1] * 5))
    axis.set_xticks(n, [str(size) for size in n])
    axis.minorticks_off()
    return figure


def failures(panels: Sequence[Mapping]) -> Figure:
    """Densities of one parameter where the Gaussian at the mode misleads: `exact` and `gaussian`."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.8))
    for axis, panel in zip(axes, panels, strict=True):
        axis.fill_between(panel["x"], panel["exact"], color=COLOURS["blue"], alpha=0.15, linewidth=0)
        axis.plot(panel["x"], panel["exact"], **EXACT)
        axis.plot(panel["x"], panel["gaussian"], **GAUSSIAN)
        axis.set(title=panel["title"], xlabel=panel["xlabel"], ylim=(0, None), yticks=[])
    axes[0].set_ylabel("density")
    axes[0].legend(loc="upper right")
    return figure


def evidence(precision: Sequence[float], curves: Mapping[str, np.ndarray], held_out: np.ndarray) -> Figure:
    """Log evidence per example above, validation loss at the mode below, against the prior's precision (k,).

    Both in nats, (seeds, k), one faint line a seed.
    """
    figure, (above, below) = plt.subplots(2, 1, figsize=(WIDTH, 4.4), sharex=True)
    for (name, values), colour, dash in zip(curves.items(), ("blue", "green"), DASHES, strict=False):
        _seeds(above, precision, values, colour, dash, name)
    _seeds(below, precision, held_out, "vermilion", "-", "validation loss")
    above.set(xscale="log", ylabel="log evidence per\ntraining example, nats")
    below.set(xlabel="prior precision", ylabel="validation loss\nat the mode, nats")
    above.legend(loc="lower center")
    return figure


def _seeds(axis: plt.Axes, x: Sequence[float], values: np.ndarray, colour: str, dash: object, name: str) -> None:
    best = values.mean(0).argmin() if name.startswith("validation") else values.mean(0).argmax()
    axis.plot(x, values.T, color=COLOURS[colour], linestyle="-", linewidth=0.5, alpha=0.4)
    axis.plot(x, values.mean(0), color=COLOURS[colour], linestyle=dash, label=name)
    axis.plot(x[best], values.mean(0)[best], "o", color=COLOURS[colour])


def turned(
    images: np.ndarray, shown: Sequence[float], angles: Sequence[float], curves: Mapping[str, np.ndarray], ylabel: str
) -> Figure:
    """A digit (m, side, side) at the angles `shown`, degrees; below, by name, shares (seeds, k) at all `angles`."""
    figure = plt.figure(figsize=(WIDTH, 4.0))
    grid = figure.add_gridspec(2, len(shown), height_ratios=(1, 3))
    for i, (image, angle) in enumerate(zip(images, shown, strict=True)):
        axis = figure.add_subplot(grid[0, i])
        axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axis.set_title(f"{angle:g}°", loc="center")
        axis.axis("off")
    axis = figure.add_subplot(grid[1, :])
    names = ("black", "vermilion", "blue", "green")
    for (name, values), colour, dash, marker in zip(curves.items(), names, DASHES, "so^D", strict=False):
        axis.plot(
            angles, values.mean(0), color=COLOURS[colour], linestyle=dash, marker=marker, markersize=4, label=name
        )
        axis.fill_between(angles, values.min(0), values.max(0), color=COLOURS[colour], alpha=0.15, linewidth=0)
    axis.set(xlabel="angle, degrees", ylabel=ylabel, ylim=(0, 1.02), xticks=angles[::2])
    axis.legend(loc="upper center", ncols=len(curves), bbox_to_anchor=(0.5, 1.2))
    return figure
