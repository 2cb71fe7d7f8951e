"""Each figure of the book as a function of results: numbers in, a matplotlib figure out; nothing is computed here.

`use_style` sets the book's look; a chapter calls it once. Colours are Okabe and Ito's, which colour-blind readers can
tell apart, and every line also differs by dash or marker.
"""

from ewc_plots.beliefs import arrival, kept, orders, springs, updates, valleys
from ewc_plots.beyond import against_fisher, merge_errors, method_averages, rises, strengths_tried, two_starts
from ewc_plots.densities import contours, evidence, failures, parabolas, rates, turned
from ewc_plots.information import along_training, one_image, pixels, sampling, spectra, step_halving
from ewc_plots.interactive import Playable, toss_coins, turn_strength, update_mean
from ewc_plots.learning import before_after, curves, figure_one, image_rows, ladder, strengths
from ewc_plots.many import by_strength, by_task, counted, directions, from_joint, remembered, sequence, stiffening
from ewc_plots.own import protected, traded, two_tasks
from ewc_plots.paper import by_depth, search, tasks_seen
from ewc_plots.scale import by_stack, memory_needed, penalty_shares, roofs, where_time_goes
from ewc_plots.scenarios import buffer_sizes, diagnoses, drift, gap, scenario_rows, valley
from ewc_plots.style import COLOURS, DASHES, use_style
from ewc_plots.wild import apart, common_and_own, first_layer, multiples, subset
