"""Where and how large: the device, the scale, and what is needed to report both. Chosen here and nowhere else."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata

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
    before = precision and torch.get_float32_matmul_precision()  # torch refuses it where backends were set one by one
    if precision:
        torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if before:
            torch.set_float32_matmul_precision(before)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    names = ("ewc-code", "torchvision", "numpy", "matplotlib", "sympy", "scipy")
    # torch's own word, because it names the build (+cpu, +cu130) where the package index's metadata may not.
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def hardware() -> str:
    """One line: the device, its model name, and the number of CPU threads torch uses."""
    chosen = device()
    if chosen.type == "cuda":
        return f"{torch.cuda.get_device_name(chosen)} ({torch.cuda.device_count()} GPU)"
    return f"{_processor()}, {chosen.type}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """Model name of the processor: Linux keeps it where `platform` does not look."""
    with suppress(OSError), open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
