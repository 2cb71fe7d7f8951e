"""Kirkpatrick et al.'s Figure 1, computed: two tasks, two parameters, true loss regions, true paths."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from ewc_code.data import Examples
from ewc_code.environment import generator
from ewc_code.gaussian import Diagonal, Full
from ewc_code.laplace import laplace
from ewc_code.models import flatten, restore, snapshot, unflatten
from ewc_experiments.density import approximate


class TwoParameters(nn.Module):
    """Logistic regression through the origin of the plane: two parameters, small enough to draw.

    logits = (0, w_1 x_1 + w_2 x_2),   p(y = 1 | x) = sigmoid(w . x)
    """

    def __init__(self, w: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, 2, 1, bias=False)
        self.linear.weight = nn.Parameter(torch.tensor([w]))

    def forward(self, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Logits of both classes; the first is 0, so that the second is the log odds."""
        logit = self.linear(x)  # (n, 1)
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


@dataclass(frozen=True)
class FigureOne:
    """Two tasks of logistic regression through the origin of the plane, with the same two parameters.

    Each task's inputs lie along a line of its own; across it they hardly vary, so that the loss has a valley. The angle
    between the lines is what makes the methods differ: at a right angle even L2 would walk along the valley.
    """

    n: int = 500  #: Examples a task.
    angles: tuple[float, float] = (5.0, 50.0)  #: Of the two lines, degrees.
    #: Class means at plus and minus this along the line; its sign gives the sense of the labels.
    separation: tuple[float, float] = (1.0, -1.0)
    along: float = 1.0  #: Standard deviation along the line.
    across: float = 0.1  #: Standard deviation across it.
    tolerance: float = 0.03  #: A loss within so many nats of the task's lowest counts as low.
    #: Strengths to choose from; the one with the lowest summed loss is drawn, so that L2 is seen at its best.
    l2: tuple[float, ...] = (0.01, 0.03, 0.05, 0.06, 0.08, 0.1, 0.3)
    seed: int = 0  #: Of the data.
    grid: int = 161  #: Points a side of the loss maps.


@dataclass
class Plane:
    """What Figure 1 shows."""

    setup: FigureOne  #: Settings.
    axes: list[list[float]]  #: Values of w_1 and of w_2 on the maps, (grid,) each.
    losses: list[list[list[float]]]  #: Mean negative log likelihoods, nats, (2, grid, grid), as [task][w_2][w_1].
    modes: list[list[float]]  #: The tasks' own optima, (2, 2).
    paths: dict[str, list[list[float]]]  #: By method, points of descent on its objective from A's optimum, (steps, 2).
    precision: list[list[float]]  #: n times the Fisher of task A at its optimum, (2, 2).
    strengths: dict[str, float]  #: By method.
    regret: dict[str, list[float]]  #: By method, each task's loss at the path's end minus its lowest, nats.


def two_parameter_tasks(setup: FigureOne) -> tuple[Examples, Examples]:
    """The data of Figure 1, float64: inputs (n, 2), labels 0 or 1, half and half."""
    draw = generator(setup.seed)
    parts = []
    for degrees, separation in zip(setup.angles, setup.separation, strict=True):
        y = torch.arange(setup.n) % 2
        along = separation * (2.0 * y - 1) + setup.along * torch.randn(setup.n, generator=draw, dtype=torch.float64)
        across = setup.across * torch.randn(setup.n, generator=draw, dtype=torch.float64)
        turn = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
        line, normal = torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])
        parts.append(Examples(along[:, None] * line + across[:, None] * normal, y))
    return parts[0], parts[1]


def figure_one(setup: FigureOne) -> Plane:
    """Optima, loss maps, and the paths of plain training, L2, and EWC with a diagonal and with a full precision."""
    first, second = two_parameter_tasks(setup)
    model = TwoParameters().double()
    flat = Diagonal.isotropic(snapshot(model))
    origin = flatten(flat.mean)
    mode_a = approximate(lambda w: setup.n * nll(w[None], first)[0], origin).mode
    mode_b = approximate(lambda w: setup.n * nll(w[None], second)[0], origin).mode
    lowest = [nll(mode_a[None], first), nll(mode_b[None], second)]
    start = unflatten(mode_a, flat.mean)
    restore(model, start)

    full = laplace(model, first, Full.isotropic(start)).precision  # (2, 2)
    diagonal = flatten(laplace(model, first, flat).precision).diag()
    spring, none = setup.n * torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    candidates = [("plain", none, 0.0), *(("L2", spring, strength) for strength in setup.l2)]
    candidates += [("EWC", diagonal, 1.0), ("EWC, full", full, 1.0)]
    walked = _descend(mode_a, second, torch.stack([strength * matrix for _, matrix, strength in candidates]))
    paths: dict[str, list[list[float]]] = {}
    strengths: dict[str, float] = {}
    regret: dict[str, list[float]] = {}
    for (name, _, strength), path in zip(candidates, walked, strict=True):
        ends = [(nll(path[-1:], part) - low).item() for part, low in zip((first, second), lowest, strict=True)]
        if name not in regret or sum(ends) < sum(regret[name]):
            paths[name], strengths[name], regret[name] = path.tolist(), strength, ends

    corners = torch.cat([torch.tensor(path, dtype=torch.float64) for path in paths.values()] + [mode_b[None]])
    low, high = corners.amin(0), corners.amax(0)
    half = float((high - low).max()) / 2 + 1.6
    axes = [torch.linspace(m - half, m + half, setup.grid).double() for m in ((low + high) / 2).tolist()]
    mesh = torch.cartesian_prod(*axes)  # (grid^2, 2), w_1 outermost
    maps = [nll(mesh, part).view(setup.grid, setup.grid).T.tolist() for part in (first, second)]
    modes = [mode_a.tolist(), mode_b.tolist()]
    return Plane(setup, [a.tolist() for a in axes], maps, modes, paths, full.tolist(), strengths, regret)


def nll(w: Float64[Tensor, "m 2"], data: Examples) -> Float64[Tensor, " m"]:
    """Mean negative log likelihood of `TwoParameters` for many weight vectors at once, nats."""
    sign = 2.0 * data.y - 1
    return F.softplus(-sign[:, None] * (data.x @ w.T)).mean(0)


def _descend(
    start: Float64[Tensor, " 2"],
    data: Examples,
    precisions: Float64[Tensor, "m 2 2"],
    rate: float = 0.5,
    steps: int = 100_000,
    rest: float = 1e-7,
) -> list[Float64[Tensor, "steps 2"]]:
    """Full-batch gradient descent in small steps, so that each path is its gradient's flow, until all paths rest.

    By path,  L(w) + (w - start)^T precision (w - start) / (2 n),  L the mean negative log likelihood of `data`. All
    descend at once, the gradient written out: ten thousand steps of autograd would take most of the figure's time.
    """
    signed = (2.0 * data.y - 1)[:, None] * data.x  # (n, 2): label times input, all that L depends on
    points = [start.expand(len(precisions), 2)]
    ends = torch.zeros(len(precisions), dtype=torch.long)  # 0 as long as a path moves
    for step in range(steps):
        w = points[-1]
        pull = torch.einsum("kij,kj->ki", precisions, w - start)
        gradient = (pull - torch.sigmoid(-w @ signed.T) @ signed) / len(data)
        ends[(ends == 0) & (gradient.norm(dim=1) < rest)] = step + 1
        points.append(w - rate * gradient)
        if ends.all():
            paths = torch.stack(points, dim=1)  # (m, steps, 2)
            return [path[: end + 1] for path, end in zip(paths, ends.tolist(), strict=True)]
    raise RuntimeError(
        f"descent must come to rest, a gradient below {rest:.0e}, within {steps:,} steps; the largest is "
        f"{gradient.norm(dim=1).max():.1e}. Choose tasks with a wider spread across their lines, or smaller strengths."
    )
