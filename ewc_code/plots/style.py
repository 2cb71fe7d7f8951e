"""The look that all figures share."""

import matplotlib
from cycler import cycler

# Okabe & Ito 2008, without the yellow, which is too pale for lines on white.
COLOURS = {
    "blue": "#0072B2",
    "vermilion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "black": "#222222",
    "grey": "#8A8A8A",
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
WIDTH = 7.2  # inches; the text column of the page


def use_style() -> None:
    """Set matplotlib's defaults for the book: white ground, thin grid, readable sizes, sharp on any screen."""
    names = ("blue", "vermilion", "green", "purple", "orange", "sky")
    matplotlib.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=[COLOURS[n] for n in names]) + cycler(linestyle=DASHES),
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.labelsize": 10,
            "figure.constrained_layout.use": True,
            "figure.dpi": 160,
            "figure.facecolor": "white",
            "figure.figsize": (WIDTH, 3.2),
            "font.size": 10,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "image.cmap": "viridis",
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
            "savefig.dpi": 160,
        }
    )
