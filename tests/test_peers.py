"""The same Fisher from packages that others keep: BackPACK, nngeometry, curvlinops. Skipped where not installed."""

import copy

import pytest
import torch
from oracles import examples, network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ewc_code import fisher
from ewc_code.data import Examples
from ewc_code.models import flatten

# Their results come in float64 as ours do; what differs is the order of the sums.
CLOSE = {"rtol": 1e-8, "atol": 1e-12}
INSTALL = "is not installed: make peers"


def convolution() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
        ).double()


@pytest.fixture(params=[network, convolution], ids=["linear", "convolution"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Examples]:
    return request.param().cpu(), Examples(examples(11).x.cpu(), examples(11).y.cpu())


def backpack_field(model: nn.Module, data: Examples, extension: str, field: str) -> torch.Tensor:
    backpack = pytest.importorskip("backpack", reason=f"backpack-for-pytorch {INSTALL}")
    from backpack import extensions

    model, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(getattr(extensions, extension)()):
        loss(model(data.x), data.y).backward()
    return torch.cat([getattr(p, field).reshape(-1) for p in model.parameters()])


@pytest.mark.filterwarnings("ignore")
def test_exact_diagonal_is_backpacks(case: tuple[nn.Module, Examples]) -> None:
    model, data = case
    found = backpack_field(model, data, "DiagGGNExact", "diag_ggn_exact")
    torch.testing.assert_close(flatten(fisher.diagonal(model, data)), found, **CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_empirical_diagonal_is_backpacks(case: tuple[nn.Module, Examples]) -> None:
    model, data = case
    found = backpack_field(model, data, "SumGradSquared", "sum_grad_squared")  # of the mean loss: 1/n in each gradient
    torch.testing.assert_close(flatten(fisher.diagonal(model, data, "data")), found * len(data), **CLOSE)


@pytest.mark.filterwarnings("ignore")
def test_diagonal_and_whole_are_nngeometrys(case: tuple[nn.Module, Examples]) -> None:
    pytest.importorskip("nngeometry", reason=f"nngeometry {INSTALL}")
    from nngeometry.metrics import FIM
    from nngeometry.object.pspace import PMatDense, PMatDiag

    model, data = case
    model, data = model.float(), Examples(data.x.float(), data.y)  # parts of its root are float32 whatever comes in
    loader = DataLoader(TensorDataset(data.x, data.y), 4)
    diagonal = FIM(copy.deepcopy(model), loader, PMatDiag, variant="classif_logits").get_diag()
    dense = FIM(copy.deepcopy(model), loader, PMatDense, variant="classif_logits").to_torch()
    # Its q_j = 1 - p_1 - ... - p_j loses digits where the rest is small, hence some units of float32's last place.
    torch.testing.assert_close(flatten(fisher.diagonal(model, data)), diagonal.detach(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(fisher.full(model, data), dense.detach(), rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_whole_is_curvlinops_generalised_gauss_newton(case: tuple[nn.Module, Examples]) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason=f"curvlinops-for-pytorch {INSTALL}")
    model, data = case
    parameters = list(model.parameters())
    operator = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [(data.x, data.y)])
    identity = torch.eye(operator.shape[1], dtype=torch.float64)
    torch.testing.assert_close(fisher.full(model, data), (operator @ identity).detach(), **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("corrected", [False, True])
def test_kronecker_factors_are_curvlinops(case: tuple[nn.Module, Examples], corrected: bool) -> None:
    curvlinops = pytest.importorskip("curvlinops", reason=f"curvlinops-for-pytorch {INSTALL}")
    model, data = case
    kind = curvlinops.EKFACLinearOperator if corrected else curvlinops.KFACLinearOperator
    operator = kind(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(data.x, data.y)],
        fisher_type=curvlinops.FisherType.TYPE2,
        separate_weight_and_bias=False,
    )
    theirs = (operator @ torch.eye(operator.shape[1], dtype=torch.float64)).detach()
    start = 0
    for name, factors in fisher.kronecker(model, data, corrected=corrected).items():
        layer = model.get_submodule(name)
        weights = torch.arange(start, start + layer.weight.numel()).reshape(len(layer.weight), -1)
        start += layer.weight.numel()
        at = torch.cat([weights, torch.arange(start, start + len(layer.bias))[:, None]], 1).flatten()
        start += len(layer.bias)
        torch.testing.assert_close(factors.dense(), theirs[at][:, at], **CLOSE)
