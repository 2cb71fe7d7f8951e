"""Figures of the chapter "Fisher information"."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, PercentFormatter
from torch import Tensor

from ewc_plots.style import COLOURS, DASHES, GREY_ZEROS, WIDTH


def step_halving(steps: Sequence[float], deviations: Tensor, remainders: Tensor) -> Figure:
    """How fast KL / (half d F d) comes to 1: |ratio - 1| (directions, steps), and what one extrapolation leaves."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4))
    axes.loglog(steps, deviations.T, "o-", color=COLOURS["blue"], alpha=0.7, markersize=4, linewidth=1.2)
    axes.loglog(steps[1:], remainders.T, "s--", color=COLOURS["vermilion"], alpha=0.7, markersize=4, linewidth=1.2)
    axes.set(xlabel="length of the step in parameter space", ylabel="distance of the ratio from 1")
    for values, text, colour in ((deviations, "as measured", "blue"), (remainders, "extrapolated once", "vermilion")):
        middle = values[:, -1].log().mean().exp().item()
        axes.annotate(text, (steps[-1], middle), xytext=(-8, 0), textcoords="offset points", ha="right", va="center",
                      color=COLOURS[colour])  # fmt: skip
    axes.set_xlim(left=steps[-1] / 3.6)
    axes.set_xticks(steps, [f"{s:g}" for s in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def spectra(eigenvalues: dict[str, tuple[Tensor, Tensor]], threshold: float) -> Figure:
    """Eigenvalues of Fisher and Hessian, sorted, one panel a state of the network; linear within +-threshold."""
    figure, panels = plt.subplots(1, len(eigenvalues), figsize=(WIDTH, 3.3), sharey=True)
    for axes, (title, (of_fisher, of_hessian)) in zip(panels, eigenvalues.items(), strict=True):
        rank = np.arange(1, len(of_fisher) + 1)
        axes.axhline(0, color=COLOURS["black"], linewidth=0.8)
        axes.plot(rank, of_hessian.flip(0), ".", color=COLOURS["vermilion"], markersize=4, linestyle="none")
        axes.plot(rank, of_fisher.flip(0), color=COLOURS["blue"], linestyle="-")
        axes.set_yscale("symlog", linthresh=threshold)
        axes.set(title=title, xlabel="rank of the eigenvalue")
    panels[0].set_ylabel("eigenvalue")
    for height, text, colour in ((0.93, "Fisher (line)", "blue"), (0.85, "Hessian (dots)", "vermilion")):
        panels[-1].text(0.97, height, text, color=COLOURS[colour], transform=panels[-1].transAxes, ha="right")
    return figure


def one_image(x: Tensor, hidden: Tensor, probs: Tensor, back: Tensor, weight: Tensor, output: Tensor) -> Figure:
    """One image on its way through a 784-100-10 network, and what it adds to the Fisher of the two weight matrices.

    `x` pixels (784,), `hidden` activations (100,), `probs` (10,), `back` mean squared gradient at the hidden layer's
    output (100,), `weight` addition to the first layer's Fisher summed over the hidden units (784,), `output` to the
    output layer's (10, 100).
    """
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH, 4.7), width_ratios=(1, 1, 1.35))
    side = int(len(hidden) ** 0.5)
    pictures = (
        (panels[0, 0], x.reshape(28, 28), r"input $h_0$: 28 × 28", "gray"),
        (panels[0, 1], hidden.reshape(-1, side), r"hidden $h_1$: 100", "viridis"),
        (panels[1, 0], weight.reshape(28, 28), r"added to $F_{W_1}$, by pixel", "magma"),
        (panels[1, 1], back.reshape(-1, side), r"$\Sigma_c\, p_c\, g_{1c}^2$, by hidden unit", "magma"),
        (panels[1, 2], output, r"added to $F_{W_2}$: 10 × 100", "magma"),
    )
    for axes, values, title, colours in pictures:
        aspect = "equal" if axes is not panels[1, 2] else "auto"
        picture = axes.imshow(values, cmap=colours, aspect=aspect, interpolation="nearest")
        figure.colorbar(picture, ax=axes, shrink=0.75)
        axes.set_title(title, fontsize=10)
        axes.set_anchor("N")
        axes.set_axis_off()
    panels[1, 2].set_axis_on()
    panels[1, 2].grid(False)
    panels[1, 2].set(xlabel="hidden unit", ylabel="class", yticks=range(0, len(probs), 3))
    panels[0, 2].semilogy(range(len(probs)), probs, "o", color=COLOURS["blue"], linestyle="none")
    panels[0, 2].set(xlabel="class", xticks=range(len(probs)))
    panels[0, 2].set_title(r"probabilities $p$: 10", fontsize=10)
    return figure


def sampling(draws: Sequence[int], errors: Tensor, predicted: Tensor) -> Figure:
    """Relative error of the sampled Fisher against the exact one: every seed (seeds, draws), and the theory's line."""
    figure, axes = plt.subplots(figsize=(WIDTH, 3.3))
    axes.loglog(draws, errors.T, "o", color=COLOURS["sky"], markersize=3.5, linestyle="none")
    axes.loglog(draws, errors.square().mean(0).sqrt(), "D", color=COLOURS["blue"], markersize=6, linestyle="none")
    axes.loglog(draws, predicted, color=COLOURS["black"], linestyle="--", linewidth=1.2)
    axes.set(xlabel="labels drawn for each image", ylabel="relative error of the diagonal")
    axes.set_xticks(draws, [str(n) for n in draws])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    lines = (("root mean square over seeds", "blue"), ("one seed", "sky"), (r"theory, no fit: slope $-1/2$", "black"))
    for i, (text, colour) in enumerate(lines):
        axes.text(0.98, 0.92 - 0.09 * i, text, color=COLOURS[colour], transform=axes.transAxes, ha="right")
    return figure


def along_training(
    steps: Sequence[int], traces: dict[str, Tensor], unsure: Tensor, gain: Tensor, accuracy: Tensor
) -> Figure:
    """The Fisher's trace while a network learns, (seeds, looks) by layer, and the two factors that it is made of."""
    figure, panels = plt.subplots(1, 3, figsize=(WIDTH, 3.2), width_ratios=(1.25, 1, 1))
    at = np.asarray(steps) + 1
    for (name, values), colour, dash in zip(traces.items(), ("blue", "vermilion", "black"), DASHES, strict=False):
        panels[0].loglog(at, values.T, color=COLOURS[colour], alpha=0.35, linewidth=0.8, linestyle=dash)
        panels[0].loglog(at, values.mean(0), color=COLOURS[colour], linestyle=dash, label=name)
    panels[0].set_title("trace of the Fisher")
    panels[0].legend(loc="lower center", fontsize=8)
    for axes, values, title in ((panels[1], unsure, "unsureness"), (panels[2], gain, "trace / unsureness")):
        axes.loglog(at, values.T, color=COLOURS["green"], alpha=0.35, linewidth=0.8, linestyle="-")
        axes.loglog(at, values.mean(0), color=COLOURS["green"], linestyle="-")
        axes.set_title(title)
    errors = (1 - accuracy).mean(0)
    errors[errors == 0] = float("nan")
    panels[1].loglog(at, errors, color=COLOURS["grey"], linestyle=":")
    panels[1].text(0.05, 0.14, "unsureness", color=COLOURS["green"], transform=panels[1].transAxes)
    panels[1].text(0.05, 0.05, "error rate", color=COLOURS["grey"], transform=panels[1].transAxes)
    for axes in panels:
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[2].yaxis.set_major_formatter("{x:g}")
    figure.supxlabel("optimiser steps + 1", fontsize=10)
    return figure


def pixels(average: Tensor, maps: dict[str, Tensor]) -> Figure:
    """The mean image, and first-layer Fishers summed over hidden units; (784,) each, one log scale, zeros in grey."""
    figure, panels = plt.subplots(1, 1 + len(maps), figsize=(WIDTH, 2.7))
    panels[0].imshow(average.reshape(28, 28), cmap="gray")
    panels[0].set_title("mean image")
    largest = max(values.max().item() for values in maps.values())
    for axes, (title, values) in zip(panels[1:], maps.items(), strict=True):
        shown = np.ma.masked_equal(values.reshape(28, 28).numpy(), 0)
        picture = axes.imshow(shown, cmap=GREY_ZEROS, norm=LogNorm(largest * 1e-6, largest))
        axes.set_title(title)
    figure.colorbar(picture, ax=panels[1:], shrink=0.85)
    for axes in panels:
        axes.set_axis_off()
    return figure
