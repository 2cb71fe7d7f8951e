"""Elastic weight consolidation, from Bayes' rule to running code: the package that the book calls.

The whole package is one loop (`ewc_code.training.learn`):

    belief = prior
    for task in tasks:
        fit(model, task.train, prior=belief)
        belief = laplace(model, task.train, prior=belief)

Read the modules in the order of their dependencies: `data`, `tasks`, `models`, `fisher`, `gaussian`, `laplace`,
`consolidation`, `training`, `sweep`, `metrics`, `experiments`. `environment` chooses device and scale; `checks` proves
identities and asserts claims; the book's figures are a package of their own, `ewc_plots`. Importing the package does
nothing else: no download, no seeding, no global style.
"""

__version__ = "0.1.0"
