"""Identities that hold pass, those that do not fail, those that cannot be decided say so; claims need true numbers."""

import builtins
import math
import sys
from typing import Any

import numpy as np
import pytest
import sympy as sp
import torch

import ewc_checks as checks
from ewc_checks import CheckFailed, claim, glue, identity, say

x, y = sp.symbols("x y", real=True)
a, b, s = sp.symbols("a b sigma", positive=True)
n, k = sp.symbols("n k", integer=True, positive=True)
f = sp.Function("f")
p = sp.Symbol("p", positive=True)
theta = sp.Matrix(sp.symbols("t1:3", real=True))
logits = sp.symbols("z1:4", real=True)
probs = [sp.exp(z) / sum(map(sp.exp, logits)) for z in logits]
precision = sp.Matrix([[a, 1], [1, b]])
density = sp.exp(-(x**2) / (2 * s**2)) / (s * sp.sqrt(2 * sp.pi))
covariance = sp.Matrix(3, 3, lambda i, j: (probs[i] if i == j else 0) - probs[i] * probs[j])

TRUE: dict[str, tuple[Any, Any]] = {
    "binomial": ((x + y) ** 2, x**2 + 2 * x * y + y**2),
    "trigonometry": (sp.sin(x) ** 2, 1 - sp.cos(x) ** 2),
    "logarithm of a product": (sp.log(a * b), sp.log(a) + sp.log(b)),
    "derivative of the logarithm": (sp.diff(sp.log(p) * a, p), a / p),
    "unevaluated derivative": (sp.Derivative(x**3, x), 3 * x**2),
    "sum with a symbolic end": (sp.Sum(k, (k, 1, n)), n * (n + 1) / 2),
    "expectation under Bernoulli": (sum(p**i * (1 - p) ** (1 - i) * i for i in (0, 1)), p),
    "normal density integrates to one": (sp.Integral(density, (x, -sp.oo, sp.oo)), sp.Integer(1)),
    "its variance": (sp.integrate(x**2 * density, (x, -sp.oo, sp.oo)), s**2),
    "gradient of a quadratic": (
        sp.Matrix([sp.diff((theta.T * precision * theta)[0] / 2, t) for t in theta]),
        precision * theta,
    ),
    "inverse": (precision.inv() * precision, sp.eye(2)),
    "softmax covariance": (sp.hessian(sp.log(sum(map(sp.exp, logits))), logits), covariance),
    "mean of the score": (sum(q * sp.diff(sp.log(q), logits[0]) for q in probs) + x, x),
    "absolute value by pieces": (sp.Max(0, x), (x + sp.Abs(x)) / 2),
    "ReLU by pieces": (sp.Piecewise((x**2, x > 0), (0, True)).diff(x), sp.Piecewise((2 * x, x > 0), (0, True))),
    "softplus": (sp.log(1 + sp.exp(x)), x + sp.log(1 + sp.exp(-x))),
    "negative symbols": (sp.sqrt(sp.Symbol("m", negative=True) ** 2) + x, x - sp.Symbol("m", negative=True)),
    "limit": (sp.Limit((1 + 1 / a) ** a, a, sp.oo), sp.E),
    "numbers": (sp.Rational(1, 3) + sp.Rational(1, 6), sp.Rational(1, 2)),
    "plain numbers": (2 + 2, 4),
    "zero on one side only": (sum(sp.diff(q, logits[0]) for q in probs), 0),
}

WRONG: dict[str, tuple[Any, Any]] = {
    "binomial": ((x + y) ** 2, x**2 - 2 * x * y + y**2),
    "trigonometry": (sp.sin(x) ** 2, 1 + sp.cos(x) ** 2),
    "logarithm of a product": (sp.log(a * b), sp.log(a) - sp.log(b)),
    "derivative of the logarithm": (sp.diff(sp.log(p) * a, p), -a / p),
    "unevaluated derivative": (sp.Derivative(x**3, x), -3 * x**2),
    "sum with a symbolic end": (sp.Sum(k, (k, 1, n)), n * (n - 1) / 2),
    "expectation under Bernoulli": (sum(p**i * (1 - p) ** (1 - i) * i for i in (0, 1)), 1 - p),
    "normal density integrates to one": (sp.Integral(density, (x, -sp.oo, sp.oo)), sp.Integer(-1)),
    "its variance": (sp.integrate(x**2 * density, (x, -sp.oo, sp.oo)), -(s**2)),
    "missing half": (sp.diff(a * x**2, x), a * x),
    "gradient of a quadratic": (
        sp.Matrix([sp.diff((theta.T * precision * theta)[0] / 2, t) for t in theta]),
        sp.Matrix([[a, 1], [-1, b]]) * theta,
    ),
    "inverse": (precision.inv() * precision, -sp.eye(2)),
    "softmax covariance": (
        sp.hessian(sp.log(sum(map(sp.exp, logits))), logits),
        sp.Matrix(3, 3, lambda i, j: (probs[i] if i == j else 0) + probs[i] * probs[j]),
    ),
    "one entry of nine": (
        sp.hessian(sp.log(sum(map(sp.exp, logits))), logits),
        covariance + sp.Matrix(3, 3, lambda i, j: p if (i, j) == (2, 2) else 0),
    ),
    "mean of the score": (sum(q * sp.diff(sp.log(q), logits[0]) for q in probs) + x, -x),
    "absolute value by pieces": (sp.Max(0, x), (x - sp.Abs(x)) / 2),
    "ReLU by pieces": (sp.Piecewise((x**2, x > 0), (0, True)).diff(x), sp.Piecewise((-2 * x, x > 0), (0, True))),
    "softplus": (sp.log(1 + sp.exp(x)), -x + sp.log(1 + sp.exp(-x))),
    "assumption that is needed": (sp.sqrt(x**2), x),
    "limit": (sp.Limit((1 + 1 / a) ** a, a, sp.oo), 1 / sp.E),
    "numbers": (sp.Rational(1, 3) + sp.Rational(1, 6), -sp.Rational(1, 2)),
    "plain numbers": (2 + 2, 5),
    "tiny": (x, x + sp.Rational(1, 10**6)),
    "zero on one side only": (sum(sp.diff(q, logits[0]) for q in probs), p),
    "undefined": (sp.nan, x),
    "infinite on both sides": (sp.oo, sp.oo),
}


@pytest.mark.parametrize("name", TRUE)
def test_true_identities_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    identity(name, *TRUE[name])
    out = capsys.readouterr().out
    assert out.startswith(f"✓ identity: {name} (assumptions: ")
    assert out.count("\n") == 1


@pytest.mark.parametrize("name", WRONG)
def test_planted_wrong_signs_fail(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckFailed, match=name):
        identity(name, *WRONG[name])
    assert capsys.readouterr().out == ""


def test_a_false_identity_shows_a_point_where_it_fails() -> None:
    with pytest.raises(CheckFailed, match=r"is false: at {'x': '.+'} the left side is .* and the right side "):
        identity("square", x**2, -(x**2))


def test_points_respect_the_assumptions() -> None:
    m, w = sp.Symbol("m", negative=True), sp.Symbol("w", integer=True, nonpositive=True)
    for symbol, test in ((m, lambda v: v < 0), (w, lambda v: v <= 0), (a, lambda v: v > 0), (n, lambda v: v >= 1)):
        drawn = [checks._draw(symbol, checks.random.Random(i)) for i in range(20)]
        assert all(test(value) for value in drawn)
    assert {checks._draw(x, checks.random.Random(i)) > 0 for i in range(20)} == {True, False}


def test_assumptions_are_stated(capsys: pytest.CaptureFixture[str]) -> None:
    identity("mixed", a + x + n, sp.Symbol("u") + n + x + a - sp.Symbol("u"))
    out = capsys.readouterr().out
    assert "n integer positive, sigma" not in out
    assert "a positive" in out
    assert "n integer positive" in out
    assert "x real" in out


def test_undecided_is_a_failure_that_says_so() -> None:
    with pytest.raises(CheckFailed, match=r"undecided.*neither proved zero nor seen to differ.*State more assumptions"):
        identity("unknown function", f(x), f(-x))
    # True, but only a number can tell: close to zero at every point, and not proved.
    nearly = sp.exp(sp.Integer(-60))
    with pytest.raises(CheckFailed, match="undecided"):
        identity("below any rounding", x + nearly, x)


def test_vacuous_identities_are_refused() -> None:
    for zero in (0, sp.Integer(0), x - x, sp.zeros(2, 2)):
        with pytest.raises(CheckFailed, match="both sides are zero as written; nothing would be checked"):
            identity("nothing", zero, zero)
    with pytest.raises(CheckFailed, match="nothing would be checked"):
        identity("no entries", sp.Matrix(0, 0, []), sp.Matrix(0, 0, []))


def test_shapes_must_agree() -> None:
    for left, right in ((sp.eye(2), sp.eye(3)), (sp.eye(2), sp.Integer(1)), (x, sp.Matrix([[x]]))):
        with pytest.raises(CheckFailed, match="must have one shape"):
            identity("shapes", left, right)


@pytest.mark.parametrize("side", [[1, 2], True, sp.Eq(x, y), sp.Interval(0, 1), {"a": 1}], ids=str)
def test_what_is_no_expression(side: Any) -> None:
    with pytest.raises(TypeError, match="must be expressions or matrices; got"):
        identity("kinds", side, side)


# Claims.


def test_a_claim_shows_one_line_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    claim("two is more than one", 2 > 1, {"two": 2.0, "parts": [1.0, 0.123456], "text": "fine", "yes": True})
    expected = "✓ claim: two is more than one (two = 2; parts = [1, 0.1235]; text = fine; yes = True)\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "condition",
    [True, np.bool_(True), torch.tensor(True), torch.ones(3).sum() > 2, np.float64(2) > 1, sp.true, sp.Integer(2) > 1],
    ids=str,
)
def test_every_kind_of_true(condition: Any) -> None:
    claim("true", condition, {"n": 1})


@pytest.mark.parametrize(
    "condition", [False, np.bool_(False), torch.tensor(False), torch.tensor([False]), sp.false], ids=repr
)
def test_every_kind_of_false(condition: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckFailed, match=r"claim 'false' does not hold: {'n': 1.5}"):
        claim("false", condition, {"n": 1.5})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "condition",
    [1, 0.5, "yes", None, [True], torch.tensor(1.0), torch.tensor([True, True]), np.array([True, False]), x > 0],
    ids=repr,
)
def test_conditions_that_are_no_single_truth_value(condition: Any) -> None:
    with pytest.raises(TypeError, match="must be True or False; got"):
        claim("what", condition, {"n": 1})


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        [1.0, math.nan],
        [[1.0], [math.inf]],
        torch.tensor([1.0, math.nan]),
        np.array([np.inf]),
        np.float32("nan"),
        sp.nan,
        sp.oo,
        sp.zoo,
    ],
    ids=repr,
)
def test_values_that_are_no_numbers_any_more(value: Any) -> None:
    with pytest.raises(CheckFailed, match="its values must be finite numbers; got"):
        claim("finite", True, {"value": value})


def test_claims_need_numbers() -> None:
    with pytest.raises(TypeError, match="give the numbers that it rests on; got none"):
        claim("empty", True, {})


@pytest.mark.parametrize("value", [[], torch.zeros(0), np.zeros((0, 2)), ()], ids=repr)
def test_an_empty_list_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match="give the numbers that it rests on; got an empty list"):
        claim("empty", True, {"value": value})


@pytest.mark.parametrize("value", [None, 1j, object(), {"a": 1}], ids=lambda v: type(v).__name__)
def test_values_that_cannot_be_recorded(value: Any) -> None:
    with pytest.raises(TypeError, match="must be numbers, texts or lists of them; got"):
        claim("kinds", True, {"value": value})


# In a notebook and outside of one.


class Display:
    def __init__(self) -> None:
        self.bundles: list[dict[str, Any]] = []

    def __call__(self, bundle: dict[str, Any], raw: bool = False) -> None:
        assert raw
        self.bundles.append(bundle)


def in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> Display:
    import IPython
    import IPython.display

    shown = Display()
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", shown)
    return shown


def test_a_notebook_gets_text_page_and_record(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    shown = in_a_notebook(monkeypatch)
    claim("a < b & more", True, {"t": torch.tensor([1.5, 2.0]), "i": np.int64(3), "f": np.float32(0.5)})
    identity("square", x * x, x**2 * sp.Integer(1))
    first, second = shown.bundles
    assert first["text/plain"].startswith("✓ claim: a < b & more")
    assert "a &lt; b &amp; more" in first["text/html"]
    assert first[checks.RECORD] == {
        "kind": "claim",
        "name": "a < b & more",
        "ok": True,
        "values": {"t": [1.5, 2.0], "i": 3, "f": 0.5},
    }
    assert second[checks.RECORD]["kind"] == "identity"
    assert second[checks.RECORD]["values"] == {"assumptions": "x real"}


def test_works_without_ipython_and_myst_nb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("IPython", "myst_nb"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    identity("square", (x + 1) ** 2, x**2 + 2 * x + 1)
    claim("one", True, {"one": 1})
    glue("answer", torch.tensor(42.5))
    lines = ["✓ identity: square (assumptions: x real)", "✓ claim: one (one = 1)"]
    assert capsys.readouterr().out.splitlines() == lines


def test_glue_hands_plain_values_to_myst_nb(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}

    class Fake:
        @staticmethod
        def glue(name: str, value: Any, display: bool) -> None:
            assert not display
            kept[name] = value

    monkeypatch.setitem(sys.modules, "myst_nb", Fake)
    glue("tensor", torch.tensor(1.5))
    glue("number", np.float32(0.25))
    glue("text", "words")
    assert kept == {"tensor": 1.5, "number": 0.25, "text": "words"}
    assert type(kept["number"]) is float


def test_say_shows_glued_values_in_their_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    shown: list[str] = []
    monkeypatch.setattr("IPython.display.display", lambda markdown: shown.append(markdown.data))
    glue("said_share", torch.tensor(0.25))
    glue("said_name", "EWC")
    say(r"**«said_name»** keeps «said_share:.0%» of $\frac{1}{2}$; 1:2 stays")
    assert shown == [r"**EWC** keeps 25% of $\frac{1}{2}$; 1:2 stays"]


def test_say_names_what_was_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "myst_nb", None)
    glue("said_here", 1)
    with pytest.raises(KeyError, match=r"said_nowhere must be computed first; run the cells above"):
        say("«said_here» and «said_nowhere:.1f»")
