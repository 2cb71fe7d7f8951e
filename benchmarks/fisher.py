"""Time of the exact diagonal Fisher of a 784-400-400-10 network over 60,000 images, in plain forward+backward passes.

Usage: python benchmarks/fisher.py   (two warm-up rounds, then the two in turn; the ratio is taken pair by pair)
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from ewc_code import fisher
from ewc_code.data import Examples, load
from ewc_code.environment import device, hardware
from ewc_code.models import mlp

ROUNDS, BATCH = 5, 1000


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    start = time.perf_counter()
    work()
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    """Print the median times and the median, smallest and largest ratio."""
    images = load("MNIST")
    parts = (images.train, images.validation)  # with the full data, the 60,000 training images
    examples = Examples(torch.cat([p.x for p in parts]), torch.cat([p.y for p in parts]))
    model = mlp((784, 400, 400, 10)).to(device())

    def plain() -> None:
        for i in range(0, len(examples), BATCH):
            model.zero_grad()
            F.cross_entropy(model(examples.x[i : i + BATCH]), examples.y[i : i + BATCH]).backward()

    def exact() -> None:
        fisher.diagonal(model, examples, batch_size=BATCH)

    pairs = [(seconds(plain), seconds(exact)) for _ in range(2 + ROUNDS)][2:]
    ratios = sorted(exact_s / plain_s for plain_s, exact_s in pairs)
    print(f"{len(examples):,} images on {hardware()}")
    fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"forward+backward {fast:.2f} s, exact {slow:.2f} s")
    print(f"ratio: median {statistics.median(ratios):.2f}, smallest {ratios[0]:.2f}, largest {ratios[-1]:.2f}")


if __name__ == "__main__":
    main()
