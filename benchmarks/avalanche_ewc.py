"""EWC on permuted MNIST, ours and Avalanche's, the same work in one run: seconds, and accuracy to see that both learn.

It needs an environment of its own (Avalanche pins other versions), in which torch stays the one that is named:

    python -m venv ~/avalanche
    ~/avalanche/bin/pip install torch==2.13.0 torchvision==0.28.0 avalanche-lib==0.6.0 scipy jaxtyping platformdirs
    PYTHONPATH=. ~/avalanche/bin/python benchmarks/avalanche_ewc.py --out benchmarks/results/avalanche.json

The same work: number of tasks and images, network, epochs, batch size, Adam, and a Fisher from all training images
after each task. What each computes then is its own: Avalanche squares the mean gradient of each batch of its loader,
whose size it takes from training. Ours runs twice: `ours` takes the exact diagonal over all classes, which is more
work, `ours, data's labels` one way back an example as Avalanche does, squared example by example. Our time holds the
accuracies on all tasks after each. Strengths are comparable in effect, not in number, and were not searched for.

Avalanche runs twice. `documented` is as its own documentation has it, with its benchmark PermutedMNIST, whose images
are read and permuted one by one whenever they are needed; `tensors` is fed with our tasks, which lie in memory.
"""

import argparse
import datetime
import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ewc_checks import provenance
from ewc_code import consolidation, data, environment, fisher, models, tasks, training


def ours(
    sequence: tuple[tasks.Task, ...],
    sizes: tuple[int, ...],
    settings: training.Settings,
    labels: fisher.Labels,
    images: int | None,
):
    """Seconds and final accuracies of `training.learn`."""
    model = models.mlp(sizes, 0).to(environment.device())
    started = time.perf_counter()
    record = training.learn(model, sequence, consolidation.ewc(30.0, labels, examples=images), settings)
    return time.perf_counter() - started, record.accuracy[-1]


def theirs(train: list, test: Callable[[nn.Module], list[float]], sizes: tuple[int, ...], settings: training.Settings):
    """Seconds and final accuracies of `avalanche.training.EWC`, quiet, without evaluation while it trains."""
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.training import EWC
    from avalanche.training.plugins import EvaluationPlugin

    stream = benchmark_from_datasets(train=train).train_stream
    model = nn.Sequential(nn.Flatten(), models.mlp(sizes, 0)).to(environment.device())
    strategy = EWC(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), settings.learning_rate),
        criterion=nn.CrossEntropyLoss(),
        ewc_lambda=1000.0,
        mode="online",
        decay_factor=1.0,
        train_mb_size=settings.batch_size,
        train_epochs=settings.epochs,
        device=environment.device(),
        evaluator=EvaluationPlugin(),
    )
    started = time.perf_counter()
    for experience in stream:
        strategy.train(experience)
    return time.perf_counter() - started, test(model)


def tensors(sequence: tuple[tasks.Task, ...]) -> tuple[list, Callable[[nn.Module], list[float]]]:
    """Our tasks as Avalanche's data sets, and the accuracies on them."""
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
    from torch.utils.data import TensorDataset

    def dataset(part: data.Examples) -> AvalancheDataset:
        attributes = [
            DataAttribute(part.y.tolist(), "targets"),
            DataAttribute([0] * len(part), "targets_task_labels", use_in_getitem=True),
        ]
        return AvalancheDataset([TensorDataset(part.x, part.y)], data_attributes=attributes)

    return [dataset(task.train) for task in sequence], lambda m: [training.accuracy(m, t.test) for t in sequence]


def documented(count: int, images: int) -> tuple[list, Callable[[nn.Module], list[float]]]:
    """Some images of each task of Avalanche's own PermutedMNIST, and the accuracies on its test images."""
    from avalanche.benchmarks.classic import PermutedMNIST
    from torch.utils.data import DataLoader

    made = PermutedMNIST(n_experiences=count, seed=0, dataset_root=data.root())

    @torch.no_grad()
    def test(model: nn.Module) -> list[float]:
        where, loaders = environment.device(), [DataLoader(e.dataset, 1000) for e in made.test_stream]
        right = [
            sum((model(x.to(where)).argmax(1).cpu() == y).sum().item() for x, y, *_ in loader) for loader in loaders
        ]
        return [count / len(loader.dataset) for count, loader in zip(right, loaders, strict=True)]

    some = torch.randperm(len(made.train_stream[0].dataset), generator=environment.generator(0))[:images].tolist()
    return [e.dataset.subset(some) for e in made.train_stream], test  # drawn: the images lie sorted by class


def main() -> None:
    """Print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--images", type=int, default=50_000, help="training images a task")
    parser.add_argument("--fisher", type=int, help="images of our Fisher; all by default, as Avalanche's")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--products", choices=("highest", "high", "medium"), help="rounding in training")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--out", type=Path, help="a file for the result, such as benchmarks/results/avalanche.json")
    given = parser.parse_args()
    sequence = tasks.permuted_mnist(given.tasks, given.images)
    sizes = (784, given.width, given.width, 10)
    settings = training.Settings(given.epochs, given.batch, 2e-3, products=given.products)
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "settings": {name: value for name, value in vars(given).items() if name != "out"},
        "commit": provenance.commit(),
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
    }
    kinds: dict[str, fisher.Labels] = {"ours": "exact", "ours, data's labels": "data"}
    for name, labels in kinds.items():
        seconds, accuracy = ours(sequence, sizes, settings, labels, given.fisher)
        result[name] = {"seconds": seconds, "average": sum(accuracy) / len(accuracy)}
    if not given.ours_only:
        result["versions"]["avalanche-lib"] = importlib.metadata.version("avalanche-lib")
        data.torchvision_datasets()  # Avalanche imports torchvision, which beside a CPU-only torch needs this
        made = {"tensors": tensors(sequence), "documented": documented(given.tasks, given.images)}
        for name, (train, test) in made.items():
            with environment.products(given.products):
                seconds, accuracy = theirs(train, test, sizes, settings)
            result[name] = {
                "seconds": seconds,
                "average": sum(accuracy) / len(accuracy),
            }
            result[name] |= {f"over {own}": seconds / result[own]["seconds"] for own in kinds}
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
