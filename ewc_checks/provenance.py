"""What a number was made with: the hardware and the versions, for the ledger, recordings and benchmarks."""

import platform
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import torch

from ewc_code.environment import device


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


def commit() -> str:
    """The commit that the packages are at, with a + where they were changed since; 'unknown' outside of a checkout."""
    folder = Path(__file__).parent.parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", "*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + "+" * bool(changed)


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
