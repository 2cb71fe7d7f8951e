"""Figures to play with: each draws its picture, and returns what the page's script needs to take the picture's place.

The picture is what a notebook, a printer, and a browser without scripts show. `book/_static/play.js` draws the same
figure with controls from the numbers handed over here, which the cell computed; nothing is computed here.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np

from ewc_code.data import Examples
from ewc_code.plane import Plane
from ewc_plots.densities import parabolas
from ewc_plots.learning import LOOK, regions
from ewc_plots.style import COLOURS, WIDTH

MIME = "application/vnd.ewc.play+json"  # known to book/_ext/book_play.py


@dataclass(frozen=True)
class Playable:
    """What a figure with controls needs: its kind, and its numbers as JSON. Displayed, it becomes part of the page."""

    kind: str
    data: Mapping[str, object]

    def __post_init__(self) -> None:
        try:
            json.dumps(self.data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "data must hold finite numbers, strings, lists and dictionaries, for a page's script to read; "
                f"{error}: convert tensors and arrays with .tolist(), and leave out what is not finite."
            ) from error

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        """The numbers for the book's page, a sentence for everything else."""
        sentence = "This is the still picture; the chapter's page in the book has it with controls to play with."
        return {MIME: {"kind": self.kind, "data": self.data}, "text/plain": sentence}


def turn_strength(
    plane: Plane,
    tasks: Sequence[Examples],
    strengths: Sequence[float],
    ends: Mapping[str, np.ndarray],
    regret: Mapping[str, np.ndarray],
) -> Playable:
    """Where descent on task B ends for each strength of the penalty, and what both tasks pay for it.

    Args:
        plane: The two tasks of Figure 1, drawn.
        tasks: Their examples, A's and B's.
        strengths: Of the penalty, (s,), rising by equal factors.
        ends: By method, the parameters at which descent ends, (s, 2).
        regret: By method, each task's loss there minus its lowest, nats, (s, 2).
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.9), width_ratios=(1, 1))
    drawn = regions(left, plane)
    for label, (x, y) in zip("AB", plane.modes, strict=True):
        left.annotate(f"optimum of {label}", (x, y), (0, 8), textcoords="offset points", fontsize=8, ha="center")
    one = int(np.abs(np.log(strengths)).argmin())
    for name, points in ends.items():
        colour, dash, marker = LOOK[name]
        left.plot(points[:, 0], points[:, 1], color=colour, linestyle=dash)
        left.plot(*points[one], marker, color=colour, markersize=7, markeredgecolor="white", zorder=6)
        summed = np.asarray(regret[name]).sum(1)
        right.plot(strengths, summed, color=colour, linestyle=dash, label=_full(name))
        right.plot(strengths[one], summed[one], marker, color=colour, markersize=7, markeredgecolor="white", zorder=6)
    colour, dash, _ = LOOK["plain"]
    right.axhline(sum(plane.regret["plain"]), color=colour, linestyle=dash, label="plain")
    left.set(xlabel=r"parameter $w_1$", ylabel=r"parameter $w_2$", aspect="equal", title="where descent ends")
    left.grid(False)
    right.set(xscale="log", yscale="log", xlabel="strength λ", ylabel="nats", title="above lowest, A and B together")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    signed = [(2.0 * task.y - 1)[:, None] * task.x for task in tasks]
    return Playable(
        "strength",
        {
            "axes": [[axis[0], axis[-1]] for axis in plane.axes],
            "modes": plane.modes,
            "regions": [_rounded(outlines) for outlines, _ in drawn],
            "levels": [[_rounded(lines) for lines in levels] for _, levels in drawn],
            # the label times the input: all that a logistic loss through the origin needs
            "signed": [np.round(part.numpy(), 5).tolist() for part in signed],
            "precision": plane.precision,
            "plain": plane.regret["plain"],
            "strengths": [float(f"{strength:.6g}") for strength in strengths],
            "regret": {name: np.round(values, 6).tolist() for name, values in regret.items()},
        },
    )


def toss_coins(
    panels: Sequence[Mapping],
    heads: int,
    tails: int,
    priors: Mapping[str, tuple[float, float]],
    most: int,
    found: Mapping[str, Mapping[str, float]],
) -> Playable:
    """A Beta posterior and its Laplace approximation, in the probability of heads and in the logit.

    Args:
        panels: As `parabolas` takes them, for the data that are seen first.
        heads, tails: These data.
        priors: By name, the two parameters of a Beta prior; the first is the one of the picture.
        most: Largest number of heads, and of tails, to choose.
        found: By coordinate, `theta` or `logit`: `mode`, `precision` and `distance` for these data.
    """
    parabolas(panels)
    choices = [{"name": name, "a": a, "b": b} for name, (a, b) in priors.items()]
    return Playable("coin", {"heads": heads, "tails": tails, "priors": choices, "most": most, "found": dict(found)})


def update_mean(
    prior: tuple[float, float],
    sigma: float,
    tasks: Mapping[str, tuple[float, int]],
    beliefs: Sequence[tuple[float, float]],
    most: int,
) -> Playable:
    """A Gaussian belief about one number, before and after each task.

    Args:
        prior: Mean and precision before any task.
        sigma: Standard deviation of an observation.
        tasks: By name, in their order, the mean of the observations and their number.
        beliefs: Mean and precision after each task.
        most: Largest number of observations to choose for a task.
    """
    if len(beliefs) != len(tasks):
        raise ValueError(f"there must be one belief after each task; got {len(tasks)} tasks, {len(beliefs)} beliefs.")
    figure, panels = plt.subplots(1, len(tasks), figsize=(WIDTH, 2.6), sharex=True, sharey=True)
    theta = np.linspace(-4.5, 4.5, 451)
    before = prior
    for panel, (name, (mean, n)), after in zip(panels, tasks.items(), beliefs, strict=True):
        grey, orange, blue = (COLOURS[colour] for colour in ("grey", "orange", "blue"))
        panel.plot(theta, _bell(theta, *before), color=grey, linestyle=":", label="belief before")
        panel.plot(theta, _bell(theta, mean, n / sigma**2), color=orange, linestyle="--", label="the task alone")
        panel.fill_between(theta, _bell(theta, *after), color=blue, alpha=0.15, linewidth=0)
        panel.plot(theta, _bell(theta, *after), color=blue, linestyle="-", label="belief after")
        panel.set(
            title=f"task {name}: Λ = {before[1]:g} + {after[1] - before[1]:g}", xlabel=r"$\theta$", ylim=(0, None)
        )
        panel.title.set_fontsize(10)
        before = after
    panels[0].set_ylabel("density")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    data = [{"name": name, "mean": mean, "n": n} for name, (mean, n) in tasks.items()]
    steps = [{"mean": mean, "precision": precision} for mean, precision in beliefs]
    start = {"mean": prior[0], "precision": prior[1]}
    return Playable("mean", {"prior": start, "sigma": sigma, "tasks": data, "beliefs": steps, "most": most})


def _full(name: str) -> str:
    return {"EWC": "EWC, diagonal", "EWC, full": "EWC, full matrix"}.get(name, name)


def _bell(theta: np.ndarray, mean: float, precision: float) -> np.ndarray:
    return np.sqrt(precision / (2 * np.pi)) * np.exp(-0.5 * precision * (theta - mean) ** 2)


def _rounded(lines: Sequence[np.ndarray]) -> list[list[list[float]]]:
    # Every third point of a contour on the maps' grid is still closer to the next than a line is wide.
    return [np.round(np.vstack([line[:-1:3], line[-1:]]), 2).tolist() for line in lines if len(line) > 1]
