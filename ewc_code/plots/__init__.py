"""Each figure of the book as a function of results: numbers in, a matplotlib figure out; nothing is computed here.

`use_style` sets the book's look; a chapter calls it once. Colours are Okabe and Ito's, which colour-blind readers can
tell apart, and every line also differs by dash or marker.
"""

from ewc_code.plots.beliefs import arrival, kept, orders, springs, updates, valleys
from ewc_code.plots.densities import contours, evidence, failures, parabolas, rates, turned
from ewc_code.plots.information import along_training, one_image, pixels, sampling, spectra, step_halving
from ewc_code.plots.learning import before_after, curves, figure_one, image_rows, ladder, strengths
from ewc_code.plots.style import COLOURS, DASHES, use_style
from ewc_code.plots.wild import apart, common_and_own, first_layer, multiples, subset
