"""Plant a wrong sign in every identity of the book, one at a time: each must turn the build red.

Runs every chapter at the smallest scale on the embedded sample, with `identity` wrapped: the true equation must hold,
and the same equation with the sign of one term turned must be refused.
"""

import itertools
import os
from pathlib import Path

import matplotlib
import pytest
import sympy as sp
from sympy.core.function import AppliedUndef

import ewc_checks as checks
import sources
from ewc_code import data

TERMS = 2  # planted a side and element; few, so that long sums do not take minutes


def planted(side):
    """The side with the sign of one term turned, wherever in it a sum stands, if that makes a difference at all."""
    turned = [-side]
    for node in sp.preorder_traversal(side):
        if isinstance(node, sp.Add):
            turned += [side.xreplace({node: node - 2 * term}) for term in node.args[:TERMS]]
    found = []
    for version in turned:
        if len(found) < TERMS and checks._counterexample(version, side) is not None:
            found.append(version)
    # A function without a definition has no value at a point; its identity must be refused all the same. What has
    # values and equals zero stays true with its sign turned: nothing is wrong there to be seen.
    return found or [-side] * side.has(AppliedUndef)


def wrong_versions(left, right):
    """Pairs of expressions that differ from (left, right) by one sign."""
    for turned in planted(right):
        yield left, turned
    if right == 0:  # nothing to turn on this side
        for turned in planted(left):
            yield turned, right


@pytest.mark.signs
@pytest.mark.parametrize("chapter", sources.chapters())
def test_every_wrong_sign_is_seen(chapter, monkeypatch):
    monkeypatch.setenv("EWC_SCALE", "smoke")
    monkeypatch.setenv("EWC_DATA", "sample")
    data._source.cache_clear()
    matplotlib.use("Agg")
    monkeypatch.chdir(sources.ROOT / "book")
    true_identity, seen, blind = checks.identity, [], []

    def identity(name, left, right):
        true_identity(name, left, right)
        pairs = checks._elements(name, sp.sympify(left), sp.sympify(right))
        wrong = list(itertools.islice((version for pair in pairs for version in wrong_versions(*pair)), TERMS))
        seen.append(name)
        if not wrong:
            blind.append(f"{name}: no sign to turn")
        for a, b in wrong:
            try:
                true_identity(name, a, b)
            except checks.CheckFailed:
                continue
            blind.append(f"{name}: {a} = {b} passed")

    monkeypatch.setattr(checks, "identity", identity)
    namespace = {"__name__": "__main__"}
    source = Path(sources.ROOT / f"{chapter}.md").read_text(encoding="utf-8")
    for cell in sources.cells(source):
        exec(compile(os.linesep * cell.line + cell.code, f"{chapter}.md", "exec"), namespace)
        matplotlib.pyplot.close("all")
    data._source.cache_clear()
    assert seen
    assert not blind
