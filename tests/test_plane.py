"""Figure 1, computed: the optima are optima, the paths start at A's, and EWC gives up least of A for B."""

import pytest
import torch
from oracles import nothing_changes

from ewc_experiments.plane import FigureOne, Plane, TwoParameters, figure_one, nll, two_parameter_tasks

SETUP = FigureOne(grid=41, l2=(0.03,))


@pytest.fixture(scope="module")
def plane() -> Plane:
    with nothing_changes():
        return figure_one(SETUP)


def test_same_numbers_again(plane: Plane) -> None:
    assert figure_one(SETUP) == plane


def test_loss_is_that_of_the_model() -> None:
    data = two_parameter_tasks(SETUP)[0]
    w = torch.tensor([[0.3, -1.2], [2.0, 0.5]], dtype=torch.float64)
    for row, found in zip(w, nll(w, data), strict=True):
        model = TwoParameters((row[0].item(), row[1].item())).double()
        expected = torch.nn.functional.cross_entropy(model(data.x), data.y)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_modes_are_where_the_gradient_vanishes(plane: Plane) -> None:
    for mode, data in zip(plane.modes, two_parameter_tasks(SETUP), strict=True):
        w = torch.tensor(mode, dtype=torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(nll(w[None], data).sum(), w)
        assert gradient.abs().max() < 1e-6


def test_maps_hold_the_loss_at_their_axes(plane: Plane) -> None:
    first, second = two_parameter_tasks(SETUP)
    for task, data in enumerate((first, second)):
        for i, j in ((0, 0), (3, 17), (40, 12)):
            w = torch.tensor([[plane.axes[0][j], plane.axes[1][i]]], dtype=torch.float64)
            assert plane.losses[task][i][j] == pytest.approx(nll(w, data).item(), rel=1e-9)


def test_every_path_starts_at_the_first_optimum_and_ewc_ends_best(plane: Plane) -> None:
    assert set(plane.paths) == {"plain", "L2", "EWC", "EWC, full"}
    for path in plane.paths.values():
        assert path[0] == pytest.approx(plane.modes[0])
    assert plane.regret["plain"][1] < 0.1 * plane.regret["plain"][0]  # as good on B as it gets, and A is lost
    lost = {name: sum(regret) for name, regret in plane.regret.items()}
    assert lost["EWC, full"] < lost["EWC"] < lost["plain"]
    assert lost["EWC, full"] < lost["L2"] < lost["plain"]
    assert plane.regret["EWC"][0] < plane.regret["plain"][0]


def test_every_path_rests_where_autograd_finds_no_slope_of_the_objective(plane: Plane) -> None:
    n, second, precision = SETUP.n, two_parameter_tasks(SETUP)[1], torch.tensor(plane.precision, dtype=torch.float64)
    matrices = {"plain": 0 * precision, "L2": n * torch.eye(2), "EWC": precision.diag().diag(), "EWC, full": precision}
    anchor = torch.tensor(plane.modes[0], dtype=torch.float64)
    for name, path in plane.paths.items():
        w = torch.tensor(path[-1], dtype=torch.float64).requires_grad_()
        spring = plane.strengths[name] * matrices[name].double() / (2 * n)
        objective = nll(w[None], second)[0] + (w - anchor) @ spring @ (w - anchor)
        (gradient,) = torch.autograd.grad(objective, w)
        assert gradient.norm() < 1e-7, name
