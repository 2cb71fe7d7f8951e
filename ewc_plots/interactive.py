"""Figures to play with: each draws its picture, and returns what the page's script needs to take the picture's place.

The picture is what a notebook, a printer, and a browser without scripts show. `book/_static/play.js` draws the same
figure with controls from the numbers handed over here, which the cell computed; nothing is computed here.
"""

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ewc_code.data import Examples
from ewc_experiments.plane import Plane
from ewc_plots.densities import parabolas
from ewc_plots.learning import LOOK, regions
from ewc_plots.style import COLOURS, WIDTH

MIME = "application/vnd.ewc.play+json"  # known to book/_ext/book_play.py


@dataclass(frozen=True)
class Playable:
    """A figure with controls: its kind, its numbers as JSON for the page's script, and its still picture.

    Displayed, it becomes part of the book's page; a notebook shows the picture and says where the controls are.
    """

    kind: str
    data: Mapping[str, object]
    title: str  #: What the picture shows, in a few words.
    picture: bytes  #: PNG.

    def __post_init__(self) -> None:
        try:
            json.dumps(self.data, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                "data must hold finite numbers, strings, lists and dictionaries, for a page's script to read; "
                f"{error}: convert tensors and arrays with .tolist(), and leave out what is not finite."
            ) from error

    @classmethod
    def of(cls, kind: str, data: Mapping[str, object], title: str, figure: Figure) -> "Playable":
        """With a drawn figure as the still picture; it is closed, so that a notebook does not show it twice."""
        file, small = BytesIO(), BytesIO()
        figure.savefig(file, format="png", bbox_inches="tight")
        plt.close(figure)
        # the page loads it beside the numbers: a palette takes a third of the bytes, and flat colours lose nothing
        Image.open(file).convert("RGB").quantize(128).save(small, format="png", optimize=True)
        return cls(kind, data, title, small.getvalue())

    def _repr_mimebundle_(self, **options: object) -> dict[str, object]:
        """Numbers and picture for the book's page; for a notebook the picture and a sentence."""
        picture = b64encode(self.picture).decode()
        sentence = "A still picture: the chapter's page in the book has controls in its place."
        shown = f'<img src="data:image/png;base64,{picture}" alt="{escape(self.title)}" style="max-width: 100%">'
        return {
            MIME: {"kind": self.kind, "data": self.data, "picture": picture},
            "text/html": f"{shown}<p>{sentence}</p>",
            "text/plain": f"{self.title}. {sentence}",
        }


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
    return Playable.of(
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
        "Where descent on task B ends for each strength of the penalty, and what both tasks then pay",
        figure,
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
    figure = parabolas(panels)
    choices = [{"name": name, "a": a, "b": b} for name, (a, b) in priors.items()]
    data = {"heads": heads, "tails": tails, "priors": choices, "most": most, "found": dict(found)}
    return Playable.of("coin", data, "A Beta posterior and its Laplace approximation in two coordinates", figure)


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
    highest = max(line.get_ydata().max() for panel in panels for line in panel.get_lines())
    panels[0].set(ylabel="density", ylim=(0, 1.05 * highest))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    given = [{"name": name, "mean": mean, "n": n} for name, (mean, n) in tasks.items()]
    steps = [{"mean": mean, "precision": precision} for mean, precision in beliefs]
    start = {"mean": prior[0], "precision": prior[1]}
    data = {"prior": start, "sigma": sigma, "tasks": given, "beliefs": steps, "most": most}
    return Playable.of("mean", data, "A Gaussian belief about one number, before and after each of three tasks", figure)


def _full(name: str) -> str:
    return {"EWC": "EWC, diagonal", "EWC, full": "EWC, full matrix"}.get(name, name)


def _bell(theta: np.ndarray, mean: float, precision: float) -> np.ndarray:
    return np.sqrt(precision / (2 * np.pi)) * np.exp(-0.5 * precision * (theta - mean) ** 2)


def _rounded(lines: Sequence[np.ndarray]) -> list[list[list[float]]]:
    # Every third point of a contour on the maps' grid is still closer to the next than a line is wide.
    return [np.round(np.vstack([line[:-1:3], line[-1:]]), 2).tolist() for line in lines if len(line) > 1]
