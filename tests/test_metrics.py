"""What an accuracy matrix says: worked by hand, within bounds, and nothing changed on the way."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from oracles import types_unchecked
from torch import Tensor

from ewc_code.metrics import (
    average_accuracy,
    backward_transfer,
    cosine,
    forgetting,
    forward_transfer,
    interval,
    overlap,
)

# R[i][j]: accuracy on task j after training on task i. Worked by hand:
#   average   (0.6 + 0.7 + 0.9) / 3
#   forgetting: best of column 1 before the end 0.9, of column 2 0.8: ((0.9 - 0.6) + (0.8 - 0.7)) / 2
#   backward transfer: ((0.6 - 0.9) + (0.7 - 0.8)) / 2
#   forward transfer over an untrained network with 0.3, 0.1, 0.15: ((0.2 - 0.1) + (0.4 - 0.15)) / 2
R = torch.tensor([[0.9, 0.2, 0.1], [0.7, 0.8, 0.4], [0.6, 0.7, 0.9]], dtype=torch.float64)


def test_worked_by_hand() -> None:
    assert average_accuracy(R) == pytest.approx(2.2 / 3)
    assert forgetting(R) == pytest.approx((0.3 + 0.1) / 2)
    assert backward_transfer(R) == pytest.approx((-0.3 - 0.1) / 2)
    untrained = torch.tensor([0.3, 0.1, 0.15], dtype=torch.float64)
    assert forward_transfer(R, untrained) == pytest.approx((0.1 + 0.25) / 2)


def test_forgetting_counts_from_the_best_and_backward_transfer_from_the_first() -> None:
    """Pitfall 18: where a later task helps an earlier one, the two differ."""
    helped = R.clone()
    helped[1, 0] = 0.95
    assert forgetting(helped) == pytest.approx((0.35 + 0.1) / 2)
    assert backward_transfer(helped) == backward_transfer(R)


@settings(max_examples=60, deadline=None)
@given(matrix=st.integers(2, 6).flatmap(lambda t: arrays("float64", (t, t), elements=st.floats(0, 1))))
def test_bounds(matrix: object) -> None:
    accuracy = torch.tensor(matrix)
    before = accuracy.clone()
    untrained = accuracy[0]
    assert 0 <= average_accuracy(accuracy) <= 1
    assert -1 <= backward_transfer(accuracy) <= 1
    assert -1 <= forgetting(accuracy) <= 1
    assert forgetting(accuracy) >= -backward_transfer(accuracy) - 1e-12  # the best is at least the first
    assert -1 <= forward_transfer(accuracy, untrained) <= 1
    assert torch.equal(accuracy, before)  # pitfall 18: one code base changes its input


def test_what_gets_better_is_forgotten_by_less_than_nothing() -> None:
    better = R.clone()
    better[2, 0] = 1.0
    assert forgetting(better) == pytest.approx((-0.1 + 0.1) / 2)
    better[2, 1] = 0.9
    assert forgetting(better) == pytest.approx((-0.1 - 0.1) / 2)


def test_nothing_forgotten_is_zero() -> None:
    constant = torch.full((4, 4), 0.7)
    assert forgetting(constant) == backward_transfer(constant) == 0


def test_matrices_that_cannot_be() -> None:
    for bad in (torch.zeros(2, 3), torch.zeros(3), torch.zeros(0, 0)):
        with types_unchecked(), pytest.raises(ValueError, match=r"must be \(tasks, tasks\); got \("):
            average_accuracy(bad)
    for metric in (forgetting, backward_transfer, lambda r: forward_transfer(r, torch.zeros(1))):
        with pytest.raises(ValueError, match="at least two tasks; got one"):
            metric(torch.ones(1, 1))
    with types_unchecked(), pytest.raises(ValueError, match=r"one accuracy a task, 3; got \(2,\)"):
        forward_transfer(R, torch.zeros(2, dtype=torch.float64))


def test_interval_is_student_s() -> None:
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * (2.5 / 5) ** 0.5, rel=1e-6)  # t table, 4 degrees of freedom
    assert (found.low, found.high) == (3 - found.half, 3 + found.half)
    assert found.n == 5
    assert interval([0.5, 0.5]).half == 0
    assert str(interval([0.5, 0.5])) == "50.0 ± 0.0 %"
    assert interval([1.0, 2.0, 3.0], level=0.5).half < interval([1.0, 2.0, 3.0]).half


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0)).tolist()
    share = sum(found.low < 0 < found.high for found in map(interval, draws)) / len(draws)
    assert share == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / 2000) ** 0.5)


@pytest.mark.parametrize("values", [[], [0.5]])
def test_one_run_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"at least two runs; got {len(values)}. Run more seeds"):
        interval(values)


def params(*numbers: float) -> dict[str, Tensor]:
    return {"a": torch.tensor(numbers[:2]), "b": torch.tensor([list(numbers[2:])])}


def test_cosine() -> None:
    assert cosine(params(1, 2, 3), params(2, 4, 6)) == pytest.approx(1)
    assert cosine(params(1, 0, 0), params(0, 0, 5)) == 0
    assert cosine(params(1, 1, 0), params(1, 0, 0)) == pytest.approx(0.5**0.5)
    turned = dict(reversed(params(1, 2, 3).items()))
    assert cosine(params(1, 2, 3), turned) == pytest.approx(1)  # the order of the names says nothing


def test_cosine_of_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"same parameters; got \['b'\] in only one"):
        cosine(params(1, 2, 3), {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="zero everywhere, and its unit trace, are not defined"):
        cosine(params(1, 2, 3), params(0, 0, 0))


def test_overlap_is_one_minus_the_frechet_distance() -> None:
    f, g = params(1, 2, 3), params(4, 0, 9)
    a, b = (torch.tensor(v, dtype=torch.float64) / sum(v) for v in ([1, 2, 3], [4, 0, 9]))
    squared = 0.5 * (a + b - 2 * (a * b).sqrt()).sum()
    assert overlap(f, g) == pytest.approx(1 - squared.item())
    assert overlap(f, params(2, 4, 6)) == pytest.approx(1)  # the size does not matter
    assert overlap(params(1, 0, 0), params(0, 1, 1)) == 0
    with pytest.raises(ValueError, match="unit trace"):
        overlap(f, params(0, 0, 0))
