"""Small networks on several cores: each core does work of its own, because one step is too short to be shared."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ewc_code.environment import device

#: Called with a function and its arguments, gives a function that waits for the result.
Pool = Callable[..., Callable[[], Any]]


@contextmanager
def one_thread(small: bool) -> Iterator[None]:
    """One thread inside of the block, where small networks would wait for a second longer than it helps them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if small else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def workers(small: bool) -> Iterator[Pool]:
    """Where pieces of work may be done at the same time.

    On a CPU with several cores small networks are given a process each core; else the work is done when it is waited
    for, here. Either way with the same results: small networks are on one thread (`one_thread`).
    """
    cores = torch.get_num_threads()
    if device().type != "cpu" or not small or cores < 2:
        yield lambda work, *given: partial(work, *given)
        return
    # Not forked: a copy of a process in which torch has threads may wait forever for one that was not copied.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, fresh, torch.set_num_threads, (1,)) as pool:
        yield lambda work, *given: pool.submit(work, *given).result
