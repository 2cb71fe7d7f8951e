"""The systems that the Fisher benchmark compares: ways to get a diagonal or Kronecker-factored Fisher of one network.

Each is a function (model, data) -> work, where work() does the job once over all of `data` and returns the diagonal by
parameter name, of Kronecker factors their product with given weights, or None where the result is neither. A peer that
is not installed raises ImportError when called.

    python benchmarks/systems.py SYSTEM NETWORK     prints the peak memory of one call, beyond what was there, in MB
"""

import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ewc_code import fisher
from ewc_code.data import Examples, load, torchvision_datasets
from ewc_code.environment import device, generator
from ewc_code.gaussian import Diagonal
from ewc_code.models import Params, mlp, snapshot
from ewc_code.training import Settings, fit

Apply = Callable[[Params], Params]  # product of the estimate's blocks with weights of the layers
Work = Callable[[], Params | Apply | None]
BATCH = 1000


def small_convolutional() -> nn.Module:
    """Two convolutions and a linear layer, 21,000 parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Unflatten(1, (1, 28, 28)),
            nn.Conv2d(1, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 5 * 5, 10),
        )


NETWORKS = {"784-400-400-10": lambda: mlp((784, 400, 400, 10)), "convolutional": small_convolutional}


def batches(data: Examples, size: int = BATCH) -> list[Examples]:
    return [data[i : i + size] for i in range(0, len(data), size)]


def plain(model: nn.Module, data: Examples) -> Work:
    """The limit: one forward and backward pass."""

    def work() -> None:
        for batch in batches(data):
            model.zero_grad()
            F.cross_entropy(model(batch.x), batch.y).backward()

    return work


def ours(labels: fisher.Labels) -> Callable[[nn.Module, Examples], Work]:
    return lambda model, data: lambda: fisher.diagonal(model, data, labels, generator(0), BATCH)


def ours_kfac(model: nn.Module, data: Examples) -> Work:
    def work() -> Apply:
        found = fisher.kronecker(model, data, batch_size=BATCH)
        return between({f"{name}.weight": (f.outputs, f.inputs) for name, f in found.items()})

    return work


def between(factors: dict[str, tuple[Tensor, Tensor]]) -> Apply:
    """Weights (o, i) to G W A, with the factors (G, A) by weight; an input that stands for the bias comes last in A."""

    def apply(weights: Params) -> Params:
        flat = {name: w.flatten(1) for name, w in weights.items()}
        cut = {name: a[: flat[name].shape[1], : flat[name].shape[1]] for name, (_, a) in factors.items()}
        return {name: (g @ flat[name] @ cut[name]).view_as(weights[name]) for name, (g, _) in factors.items()}

    return apply


def loop(labels: str) -> Callable[[nn.Module, Examples], Work]:
    """One image at a time, as most tutorials have it."""

    def make(model: nn.Module, data: Examples) -> Work:
        named = dict(model.named_parameters())

        def work() -> Params:
            total = {name: torch.zeros_like(p) for name, p in named.items()}
            for x, y in zip(data.x, data.y, strict=True):
                log_probs = model(x[None]).log_softmax(1)[0]
                weights = log_probs.exp().tolist() if labels == "exact" else [float(c == y) for c in range(10)]
                for c, weight in enumerate(weights):
                    if weight:
                        found = torch.autograd.grad(log_probs[c], list(named.values()), retain_graph=True)
                        for name, g in zip(named, found, strict=True):
                            total[name] += weight * g.square() / len(data)
            return total

        return work

    return make


def vmapped(labels: str) -> Callable[[nn.Module, Examples], Work]:
    """`torch.func`: per-example gradients of 64 images at a time."""

    def make(model: nn.Module, data: Examples) -> Work:
        def work() -> Params:
            total = {name: torch.zeros_like(p) for name, p in snapshot(model).items()}
            for batch in batches(data, 64):
                with torch.no_grad():
                    probs = model(batch.x).softmax(1)
                for c in range(10) if labels == "exact" else (None,):
                    y = batch.y if c is None else torch.full_like(batch.y, c)
                    weight = torch.ones(len(y), device=y.device) if c is None else probs[:, c]
                    for name, s in fisher.scores(model, batch.x, y).items():
                        total[name] += torch.einsum("b,b...->...", weight, s.square()) / len(data)
            return total

        return work

    return make


def backpack(extension: str, field: str) -> Callable[[nn.Module, Examples], Work]:
    def make(model: nn.Module, data: Examples) -> Work:
        from backpack import backpack as context
        from backpack import extend, extensions

        model, loss = extend(model), extend(nn.CrossEntropyLoss())

        def work() -> Params | Apply:
            total: dict = {}
            for batch in batches(data):
                model.zero_grad()
                with context(getattr(extensions, extension)()):
                    loss(model(batch.x), batch.y).backward()
                # Of the mean loss: squares of gradients that carry 1/n each must be brought back to a mean of squares.
                share = len(batch) / len(data) * (len(batch) if field == "sum_grad_squared" else 1)
                for name, p in model.named_parameters():
                    if field != "kfac":
                        total[name] = total.get(name, 0) + share * getattr(p, field)
                    elif p.ndim > 1:  # the bias has a factor of outputs alone
                        g, a = total.get(name, (0, 0))
                        total[name] = (g + share * p.kfac[0], a + share * p.kfac[1])
            return between(total) if field == "kfac" else total

        return work

    return make


def nngeometry(representation: str, trials: int = 0) -> Callable[[nn.Module, Examples], Work]:
    def make(model: nn.Module, data: Examples) -> Work:
        from nngeometry import metrics
        from nngeometry.object import pspace

        loader = DataLoader(TensorDataset(data.x, data.y), BATCH)
        kind = getattr(pspace, representation)
        options = {"variant": "classif_logits", "device": str(data.x.device)}

        def work() -> Params | Apply:
            if trials:
                found = metrics.FIM_MonteCarlo(model, loader, kind, trials=trials, **options)
            else:
                found = metrics.FIM(model, loader, kind, **options)
            if representation == "PMatDiag":
                return unflat(model, found.get_diag())
            return between({f"{name}.weight": (g, a) for name, (a, g) in found.data.items()})

        return work

    return make


def curvlinops_kfac(model: nn.Module, data: Examples) -> Work:
    from curvlinops import FisherType, KFACLinearOperator

    parameters = [p for p in model.parameters() if p.requires_grad]

    def work() -> Apply:
        pairs = [(batch.x, batch.y) for batch in batches(data)]
        operator = KFACLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, pairs, fisher_type=FisherType.TYPE2, check_deterministic=False
        )
        operator @ torch.zeros(operator.shape[1], device=data.x.device)  # what is lazy is done now

        def apply(weights: Params) -> Params:
            whole = [weights.get(name, torch.zeros_like(p)) for name, p in model.named_parameters()]
            found = unflat(model, operator @ torch.cat([w.flatten() for w in whole]))
            return {name: found[name] for name in weights}

        return apply

    return work


def curvlinops_diagonal(model: nn.Module, data: Examples) -> Work:
    """Matrix-vector products only: an estimate of the exact diagonal from 20 products (XDiag)."""
    from curvlinops import GGNLinearOperator, xdiag

    parameters = [p for p in model.parameters() if p.requires_grad]

    def work() -> Params:
        pairs = [(batch.x, batch.y) for batch in batches(data)]
        operator = GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, pairs, check_deterministic=False)
        return unflat(model, xdiag(operator, 20))

    return work


def laplace_torch(structure: str) -> Callable[[nn.Module, Examples], Work]:
    def make(model: nn.Module, data: Examples) -> Work:
        torchvision_datasets()  # it imports torchvision, which beside a CPU-only torch needs this
        from laplace import Laplace

        loader = DataLoader(TensorDataset(data.x, data.y), BATCH)

        def work() -> Params | Apply:
            found = Laplace(model, "classification", subset_of_weights="all", hessian_structure=structure)
            found.fit(loader)
            if structure == "diag":
                return unflat(model, found.H / len(data))
            terms = zip(model.named_parameters(), found.H.eigenvectors, found.H.eigenvalues, strict=True)
            whole = {  # it keeps the factors of the sum over all images, taken apart
                name: [q @ torch.diag(values) @ q.T for q, values in zip(vectors, own, strict=True)]
                for (name, p), vectors, own in terms
                if p.ndim > 1
            }
            return between({name: (g / len(data), a) for name, (g, a) in whole.items()})

        return work

    return make


def opacus(model: nn.Module, data: Examples) -> Work:
    from opacus.grad_sample import GradSampleModule

    model.train()  # it keeps activations in this mode only; the networks here have nothing that the mode changes

    def work() -> Params:
        wrapped = GradSampleModule(model, loss_reduction="sum")
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for batch in batches(data, 64):
            model.zero_grad()
            F.cross_entropy(wrapped(batch.x), batch.y, reduction="sum").backward()
            for name, p in model.named_parameters():
                total[name] += p.grad_sample.square().sum(0) / len(data)
                p.grad_sample = None
        wrapped.remove_hooks()
        wrapped.to_standard_module()
        return total

    return work


def unflat(model: nn.Module, vector: Tensor) -> Params:
    sizes = [p.numel() for p in model.parameters()]
    parts = vector.detach().split(sizes)
    return {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}


@dataclass(frozen=True)
class System:
    """One row of the table.

    Args:
        make: See above.
        kind: limit, exact, sampled, data or kronecker: what it computes, and so what its error is measured against.
        peer: Package that it comes from.
        images: As many as it can do in a second or so.
    """

    make: Callable[[nn.Module, Examples], Work]
    kind: str
    peer: str
    images: int = 20_000


SYSTEMS = {
    "forward and backward": System(plain, "limit", "torch"),
    "ewc_code, exact": System(ours("exact"), "exact", "ewc_code"),
    "ewc_code, sampled": System(ours("sampled"), "sampled", "ewc_code"),
    "ewc_code, data": System(ours("data"), "data", "ewc_code"),
    "ewc_code, KFAC exact": System(ours_kfac, "kronecker", "ewc_code"),
    "loop over images, exact": System(loop("exact"), "exact", "torch", 100),
    "loop over images, data": System(loop("data"), "data", "torch", 500),
    "torch.func, exact": System(vmapped("exact"), "exact", "torch", 128),
    "torch.func, data": System(vmapped("data"), "data", "torch", 512),
    "BackPACK, exact": System(backpack("DiagGGNExact", "diag_ggn_exact"), "exact", "backpack", 5000),
    "BackPACK, sampled": System(backpack("DiagGGNMC", "diag_ggn_mc"), "sampled", "backpack"),
    "BackPACK, data": System(backpack("SumGradSquared", "sum_grad_squared"), "data", "backpack"),
    "BackPACK, KFAC sampled": System(backpack("KFAC", "kfac"), "kronecker", "backpack"),
    "nngeometry, exact": System(nngeometry("PMatDiag"), "exact", "nngeometry", 5000),
    "nngeometry, sampled": System(nngeometry("PMatDiag", 1), "sampled", "nngeometry"),
    "nngeometry, KFAC exact": System(nngeometry("PMatKFAC"), "kronecker", "nngeometry", 5000),
    "curvlinops, KFAC exact": System(curvlinops_kfac, "kronecker", "curvlinops", 5000),
    "curvlinops, XDiag of the exact": System(curvlinops_diagonal, "exact", "curvlinops", 1000),
    "laplace-torch, exact": System(laplace_torch("diag"), "exact", "laplace", 20),
    "laplace-torch, KFAC": System(laplace_torch("kron"), "kronecker", "laplace", 2000),
    "Opacus, data": System(opacus, "data", "opacus", 1000),
}


def case(network: str, images: int) -> tuple[nn.Module, Examples]:
    """A network after one pass over 2,000 training images, and the images to take the Fisher of."""
    train = load("MNIST").train
    model = NETWORKS[network]().to(device())
    fit(model, train[:2000], Diagonal.isotropic(snapshot(model)), 0.0, Settings(epochs=1), generator(0))
    model.eval()
    repeats = -(-images // len(train))
    return model, Examples(train.x.repeat(repeats, 1)[:images], train.y.repeat(repeats)[:images])


def peak_megabytes(name: str, network: str) -> float:
    """Peak memory of one call beyond what the process held before it."""
    model, data = case(network, min(SYSTEMS[name].images, 3 * BATCH))
    warm = SYSTEMS[name].make(model, data[:64])
    warm()  # imports, and the libraries' own workspaces
    work = SYSTEMS[name].make(model, data)
    if data.x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _status("VmRSS")
    work()
    return (_status("VmHWM") - before) / 2**10


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(peak_megabytes(*sys.argv[1:3]))
