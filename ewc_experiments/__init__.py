"""The experiments of the book: each a frozen dataclass of settings, and a pure function from settings to results.

A package of its own, so that the methods in `ewc_code` can be read and used without it. Every experiment has settings
for the three scales (`SCALED[scale]`).
"""
