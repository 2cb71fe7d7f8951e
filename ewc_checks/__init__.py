"""Checks that a chapter runs beside its claims: an equation proved by computer algebra, a statement about numbers.

Both stop the build when they fail, show one quiet line when they hold, and leave a record in the cell's output, from
which the ledger of the book is made.
"""

import html
import math
import random
import re
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np
import sympy as sp
from torch import Tensor

RECORD = "application/vnd.ewc.check+json"
POINTS = 5
_GLUED: dict[str, Any] = {}  # by name, for `say`


class CheckFailed(AssertionError):
    """An identity or a claim of the book does not hold."""


def identity(name: str, left: Any, right: Any) -> None:
    """Prove left = right: the difference is simplified to zero by sympy, under the symbols' own assumptions.

    Both are expressions or matrices (else a TypeError), of one shape; `name` says what the equation does, in words, and
    is unique within the chapter. CheckFailed is raised when the two differ (a point where they do is given), when
    simplification cannot decide, or when both are zero before anything was done, so that nothing would be checked.
    """
    left, right = sp.sympify(left), sp.sympify(right)
    pairs = _elements(name, left, right)
    if all(a == 0 and b == 0 for a, b in pairs):
        raise CheckFailed(f"identity '{name}': both sides are zero as written; nothing would be checked.")
    for a, b in pairs:
        _prove(name, a, b)
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    _show("identity", name, {"assumptions": ", ".join(map(_assumed, symbols)) or "none"})


def claim(name: str, condition: Any, values: dict[str, Any]) -> None:
    """Assert a statement about results, and record the numbers that it rests on: numbers, texts, or lists of them.

    The name is the statement, in words or as `figure.statement`, unique within the chapter. CheckFailed is raised when
    the condition is false or a value is not a number any more, TypeError when it is not a single truth value or there
    are no values.
    """
    if isinstance(condition, Tensor) and condition.numel() == 1:
        condition = condition.item()
    if not isinstance(condition, bool | np.bool_ | sp.logic.boolalg.BooleanAtom):
        raise TypeError(f"claim '{name}': the condition must be True or False; got {condition!r}.")
    if not values:
        raise TypeError(f"claim '{name}': give the numbers that it rests on; got none.")
    plain = {key: _plain(name, value) for key, value in values.items()}
    if not condition:
        raise CheckFailed(f"claim '{name}' does not hold: {plain}")
    _show("claim", name, plain)


def glue(name: str, value: Any) -> None:
    """Keep a value for the prose of a chapter: for MyST-NB when the book is built, for `say` in a notebook."""
    _GLUED[name] = value = value.item() if isinstance(value, Tensor | np.generic) else value
    with suppress(ImportError):
        from myst_nb import glue as keep

        keep(name, value, display=False)


def say(text: str) -> None:
    """Show Markdown in which «name:format» stands for a glued value; a name that no cell has glued is a KeyError."""
    from IPython.display import Markdown, display

    if missing := set(re.findall(r"«([^»:]+)", text)) - set(_GLUED):
        raise KeyError(f"{', '.join(sorted(missing))} must be computed first; run the cells above this one.")
    display(Markdown(re.sub(r"«([^»:]+):?([^»]*)»", lambda found: format(_GLUED[found[1]], found[2]), text)))


def _elements(name: str, left: Any, right: Any) -> list[tuple[sp.Expr, sp.Expr]]:
    for side in (left, right):
        if not isinstance(side, sp.Expr | sp.MatrixBase | sp.NDimArray):
            raise TypeError(f"identity '{name}': both sides must be expressions or matrices; got {side!r}.")
    if getattr(left, "shape", ()) != getattr(right, "shape", ()):
        raise CheckFailed(f"identity '{name}': both sides must have one shape; got {left} and {right}.")
    if hasattr(left, "shape"):
        return list(zip(sp.flatten(sp.Matrix(left)), sp.flatten(sp.Matrix(right)), strict=True))
    return [(left, right)]


def _prove(name: str, left: sp.Expr, right: sp.Expr) -> None:
    difference = (left - right).doit()
    if sp.expand(difference) == 0:
        return
    # A look at numbers first: where the sides differ, simplifying would only take long to say so.
    if (point := _counterexample(left, right)) is not None:
        at, a, b = point
        raise CheckFailed(f"identity '{name}' is false: at {at} the left side is {a} and the right side {b}.")
    attempts = (
        sp.simplify,
        sp.factor,
        lambda d: sp.simplify(sp.expand_log(sp.expand(d), force=False)),
        lambda d: sp.simplify(sp.piecewise_fold(d.rewrite(sp.Piecewise))),  # Max, Abs
    )
    if not any(attempt(difference) == 0 for attempt in attempts):
        raise CheckFailed(
            f"identity '{name}': undecided. Simplification left {sp.simplify(difference)}, which was neither proved "
            f"zero nor seen to differ at {POINTS} random points. State more assumptions, or split the step."
        )


def _counterexample(left: sp.Expr, right: sp.Expr) -> tuple[dict[str, str], str, str] | None:
    """A random point, within the symbols' assumptions, at which the sides differ by more than rounding."""
    draw = random.Random(0)
    symbols = sorted(left.free_symbols | right.free_symbols, key=str)
    for _ in range(POINTS):
        at = {symbol: _draw(symbol, draw) for symbol in symbols}
        try:
            a, b = (complex(side.doit().subs(at).doit().evalf(30)) for side in (left, right))
        except (TypeError, ValueError, OverflowError):
            continue
        if math.inf > abs(a - b) > 1e-9 * max(1.0, abs(a), abs(b)):
            return {str(s): str(v) for s, v in at.items()}, f"{a:.6g}", f"{b:.6g}"
    return None


def _draw(symbol: sp.Symbol, draw: random.Random) -> sp.Expr:
    size = sp.Integer(draw.randint(1, 6)) if symbol.is_integer else sp.Rational(draw.randint(20, 95), 100)
    if symbol.is_nonpositive:
        return -size
    return size if symbol.is_nonnegative or symbol.is_integer or draw.random() < 0.5 else -size


def _assumed(symbol: sp.Symbol) -> str:
    words = ("integer", "positive", "negative", "nonnegative", "nonpositive", "real")
    stated = [word for word in words if getattr(symbol, f"is_{word}")]
    if "positive" in stated or "negative" in stated:
        stated = [word for word in stated if word in ("integer", "positive", "negative")]
    return f"{symbol} {' '.join(stated)}" if stated else f"{symbol} complex"


def _plain(name: str, value: Any) -> Any:
    """The value as JSON can hold it; anything that is not finite is refused."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if not value:
            raise TypeError(f"claim '{name}': give the numbers that it rests on; got an empty list.")
        return [_plain(name, part) for part in value]
    if isinstance(value, bool | str | int):
        return value
    if isinstance(value, sp.Basic) and not value.has(sp.nan, sp.oo, -sp.oo, sp.zoo):
        return str(value)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    if isinstance(value, sp.Basic | Real):
        raise CheckFailed(f"claim '{name}': its values must be finite numbers; got {value}.")
    raise TypeError(f"claim '{name}': values must be numbers, texts or lists of them; got {type(value).__name__}.")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "[" + ", ".join(map(_short, value)) + "]" if isinstance(value, list) else str(value)


def _show(kind: str, name: str, values: dict[str, Any]) -> None:
    link = " = " if kind == "claim" else ": "
    shown = "; ".join(f"{key}{link}{_short(value)}" for key, value in values.items())
    text = f"✓ {kind}: {name} ({shown})"
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        get_ipython = None
    if get_ipython is None or get_ipython() is None:
        print(text)
        return
    page = (
        f'<p class="ewc-check"><span aria-hidden="true">✓</span> <span class="ewc-check-kind">{kind}</span> '
        f'{html.escape(name)} <span class="ewc-check-values">{html.escape(shown)}</span></p>'
    )
    record = {"kind": kind, "name": name, "ok": True, "values": values}
    display({"text/plain": text, "text/html": page, RECORD: record}, raw=True)
