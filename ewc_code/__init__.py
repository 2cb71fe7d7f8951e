"""Elastic weight consolidation, from Bayes' rule to running code: the package that the book calls.

The whole package is one loop (`ewc_code.training.learn`):

    belief = prior
    for task in tasks:
        fit(model, task.train, prior=belief)
        belief = laplace(model, task.train, prior=belief)

Read the modules in the order of the book's API page. Importing the package does nothing: no download, no seeding, no
global style. The book's figures are a package of their own, `ewc_plots`.
"""

__version__ = "0.1.0"
