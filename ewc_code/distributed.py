r"""Curvature of data that is spread over processes, by `torch.distributed`: gloo on CPUs, NCCL on GPUs.

The Fisher of all examples is the mean of the processes' own, each weighted by its number of examples. One line more
than on one process, the same on every rank:

    found, n = fisher.over_batches(fisher.diagonal, model, my_share)
    found, n = distributed.across(found, n)

Training needs nothing of this module. Under `DistributedDataParallel` every rank adds the same penalty to the mean loss
of its own examples, with shares of one size. Its parameters' names begin with `module.`, as those of torch.compile with
`_orig_mod.`: beliefs are about the model inside. Chapter "Scale".
"""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from ewc_code.fisher import Factors


def across(found: Any, n: int, group: Any = None) -> tuple[Any, int]:
    r"""Mean over the examples of all processes, from each one's mean over its own, and the number of all examples.

        found = 1/N sum_r n_r found_r,   N = sum_r n_r

    `found` is what a function of `fisher` gives: a tensor, or a dictionary of tensors or of KFAC `Factors`, of the same
    names and shapes on every rank; `n`, at least 1, is the number of this rank's examples. Every rank of the `group`
    (None: all processes) calls it, and all get the same numbers. With `labels="sampled"` each rank needs a seed of its
    own, or all draw alike.

    A RuntimeError without a process group; a ValueError where what the ranks bring does not fit together, on all ranks
    at once, so that none waits for the others.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "a process group must be initialised; there is none. Start the program with torchrun and call "
            "torch.distributed.init_process_group() first; on one process leave `across` out."
        )
    parts = list(_parts(found, ""))
    described = zlib.crc32(repr([(name, tuple(value.shape), value.dtype) for name, value in parts]).encode())
    mine = torch.tensor([n, described], device=parts[0][1].device if parts else None)
    each = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(each, mine, group)
    counts, kinds = zip(*(row.tolist() for row in each), strict=True)
    if not parts or min(counts) < 1 or len(set(kinds)) > 1:
        raise ValueError(
            f"every rank must bring the same names and shapes from at least one example; got examples {counts} and "
            f"{len(set(kinds))} kinds of {len(parts)} tensors. Give each rank a share, and build the same model on all."
        )
    total = sum(counts)
    sums = [value.detach() * (n / total) for _, value in parts]
    for work in [dist.all_reduce(value, group=group, async_op=True) for value in sums]:
        work.wait()
    return _whole(found, iter(sums)), total


def _parts(found: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, Tensor):
        yield name, found
    elif isinstance(found, Factors) and found.scale is None:
        yield from ((f"{name}/inputs", found.inputs), (f"{name}/outputs", found.outputs))
    elif isinstance(found, dict):
        for key in found:
            yield from _parts(found[key], f"{name}/{key}")
    else:
        what = "Factors of EKFAC, whose bases differ from rank to rank" if isinstance(found, Factors) else type(found)
        raise ValueError(f"found must be a tensor, or tensors or KFAC Factors by name; got {what}.")


def _whole(like: Any, parts: Iterator[Tensor]) -> Any:
    if isinstance(like, dict):
        return {key: _whole(value, parts) for key, value in like.items()}
    return Factors(next(parts), next(parts)) if isinstance(like, Factors) else next(parts)
