"""The look that all figures share; the settings themselves stand in `book.mplstyle`."""

from pathlib import Path

from matplotlib import pyplot as plt

# Okabe & Ito 2008, without the yellow, which is too pale for lines on white.
NAMES = ("blue", "vermilion", "green", "purple", "orange", "sky", "black", "grey")
HEX = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222", "#8A8A8A")
COLOURS = dict(zip(NAMES, HEX, strict=True))
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
WIDTH = 7.2  # inches; the text column of the page
GREY_ZEROS = plt.get_cmap("magma").with_extremes(bad="#b8b8b8")  # for maps on a log scale, with their zeros masked


def use_style() -> None:
    """Set matplotlib's defaults for the book: white ground, thin grid, readable sizes, sharp on any screen."""
    plt.style.use(Path(__file__).with_name("book.mplstyle"))
