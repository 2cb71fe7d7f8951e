"""Where and how large: the device and the scale. Chosen here and nowhere else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

SCALES = ("smoke", "laptop", "paper")


def device() -> torch.device:
    """Device that everything runs on: `EWC_DEVICE` when set, else CUDA, else the CPU.

    Apple's MPS is used only on request (`EWC_DEVICE=mps`): it has no float64, which the exactness checks need. A name
    that is no device, or that this machine or this torch does not have, is a ValueError.
    """
    name = os.environ.get("EWC_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen).item()  # the value too: 'meta' has none
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(
            f"EWC_DEVICE must name a device that works here, one of {have}; got {name!r}. "
            f"Unset EWC_DEVICE to let the book choose."
        ) from error
    return chosen


def scale() -> str:
    """Size of the experiments: `EWC_SCALE` (smoke, laptop, paper), else 'paper' on CUDA and 'laptop' elsewhere.

    In seconds a chapter, minutes for the book on two cores, the papers' own settings. Another name is a ValueError.
    """
    name = os.environ.get("EWC_SCALE") or ("paper" if device().type == "cuda" else "laptop")
    if name not in SCALES:
        raise ValueError(f"EWC_SCALE must be one of {', '.join(SCALES)}; got {name!r}. Unset it for the default.")
    return name


def generator(seed: int, on: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own, so that nothing depends on torch's global state.

    The same seed, any integer, gives the same numbers again on the same machine. `on` is the device of the tensors it
    will draw; drawing on the CPU and moving gives the same draws on every device.
    """
    return torch.Generator(device=on).manual_seed(seed)


@contextmanager
def products(precision: str | None) -> Iterator[None]:
    """Within, torch's float32 matrix products take this `torch.set_float32_matmul_precision`; None touches nothing."""
    before = None
    with suppress(RuntimeError):  # torch refuses to say it where backends were set one by one; then they stay
        before = precision and torch.get_float32_matmul_precision()
    if before and precision and before != precision:  # setting is no change only where torch is left alone
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if before and before != precision:
            torch.set_float32_matmul_precision(before)
