"""EWC on permuted MNIST, ours and Avalanche's, the same work in one run: seconds, and accuracy to see that both learn.

It needs an environment of its own (Avalanche pins other versions), in which torch stays the one that is named:

    python -m venv ~/avalanche
    ~/avalanche/bin/pip install torch==2.13.0 torchvision==0.28.0 avalanche-lib==0.6.0 scipy jaxtyping platformdirs
    PYTHONPATH=. ~/avalanche/bin/python benchmarks/avalanche_ewc.py --tasks 10 --images 50000

The same work: permutations, images, network, epochs, batch size, Adam, and a Fisher from all training images after each
task. What each computes then is its own: Avalanche squares the mean gradient of each batch of its loader, whose size it
takes from training; ours is the exact diagonal over all classes. Strengths are comparable in effect, not in number.
"""

import argparse
import json
import time

import torch
from torch import nn

from ewc_code import consolidation, data, environment, models, tasks, training


def ours(sequence: tuple[tasks.Task, ...], sizes: tuple[int, ...], settings: training.Settings, images: int | None):
    """Seconds and final accuracies of `training.learn`."""
    model = models.mlp(sizes, 0).to(environment.device())
    started = time.perf_counter()
    record = training.learn(model, sequence, consolidation.ewc(30.0, examples=images), settings)
    return time.perf_counter() - started, record.accuracy[-1]


def theirs(sequence: tuple[tasks.Task, ...], sizes: tuple[int, ...], settings: training.Settings):
    """Seconds and final accuracies of `avalanche.training.EWC`, quiet, without evaluation while it trains."""
    data.torchvision_datasets()  # it imports torchvision, which beside a CPU-only torch needs this
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute
    from avalanche.training import EWC
    from avalanche.training.plugins import EvaluationPlugin
    from torch.utils.data import TensorDataset

    def dataset(part: data.Examples, label: int) -> AvalancheDataset:
        attributes = [
            DataAttribute(part.y.tolist(), "targets"),
            DataAttribute([label] * len(part), "targets_task_labels", use_in_getitem=True),
        ]
        return AvalancheDataset([TensorDataset(part.x, part.y)], data_attributes=attributes)

    stream = benchmark_from_datasets(train=[dataset(task.train, 0) for task in sequence]).train_stream
    model = models.mlp(sizes, 0).to(environment.device())
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
    seconds = time.perf_counter() - started
    return seconds, [training.accuracy(model, task.test) for task in sequence]


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--images", type=int, default=50_000, help="training images a task")
    parser.add_argument("--fisher", type=int, help="images of our Fisher; all by default, as Avalanche's")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--products", choices=("highest", "high", "medium"), help="rounding in training")
    parser.add_argument("--ours-only", action="store_true")
    given = parser.parse_args()
    sequence = tasks.permuted_mnist(given.tasks, given.images)
    sizes = (784, given.width, given.width, 10)
    settings = training.Settings(given.epochs, given.batch, 2e-3, products=given.products)
    result = {"settings": vars(given), "hardware": environment.hardware()}
    seconds, accuracy = ours(sequence, sizes, settings, given.fisher)
    result["ours"] = {"seconds": seconds, "average": sum(accuracy) / len(accuracy)}
    if not given.ours_only:
        with environment.products(given.products):
            seconds, accuracy = theirs(sequence, sizes, settings)
        result["avalanche"] = {"seconds": seconds, "average": sum(accuracy) / len(accuracy)}
        result["ratio"] = result["avalanche"]["seconds"] / result["ours"]["seconds"]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
