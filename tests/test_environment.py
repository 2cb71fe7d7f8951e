"""Device, scale, generators; and that importing or using the package leaves nothing behind in the process."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ewc_code
from ewc_checks import provenance
from ewc_code import environment

ROOT = Path(__file__).parent.parent


def test_device_is_the_one_asked_for_else_the_gpu_else_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWC_DEVICE", "cpu")
    assert environment.device() == torch.device("cpu")
    monkeypatch.delenv("EWC_DEVICE")
    assert environment.device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setenv("EWC_DEVICE", "")
    assert environment.device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "CPU!", "1x"])
def test_unknown_device(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EWC_DEVICE", name)
    with pytest.raises(ValueError, match=rf"must name a device that works here, one of \['cpu'.*got '{name}'.*Unset"):
        environment.device()


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_device_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EWC_DEVICE", "mps")
    with pytest.raises(ValueError, match="got 'mps'"):
        environment.device()


@pytest.mark.parametrize("name", environment.SCALES)
def test_scale_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EWC_SCALE", name)
    assert environment.scale() == name


def test_scale_by_default_goes_with_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EWC_SCALE", raising=False)
    monkeypatch.setenv("EWC_DEVICE", "cpu")
    assert environment.scale() == "laptop"
    monkeypatch.setattr(environment, "device", lambda: torch.device("cuda"))
    assert environment.scale() == "paper"


@pytest.mark.parametrize("name", ["huge", "Laptop", "smoke "])
def test_unknown_scale(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("EWC_SCALE", name)
    with pytest.raises(ValueError, match=f"one of smoke, laptop, paper; got '{name}'. Unset it for the default"):
        environment.scale()


def test_generators_are_their_own() -> None:
    before = torch.get_rng_state()
    first, again = (torch.rand(5, generator=environment.generator(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(5, generator=environment.generator(4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert environment.generator(-1).initial_seed() != environment.generator(1).initial_seed()


def test_versions_and_hardware_can_be_reported() -> None:
    found = provenance.versions()
    assert found["torch"] == torch.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"numpy", "sympy", "torchvision"} <= set(found)
    assert "\n" not in provenance.hardware()
    assert len(provenance.hardware()) > 5
    assert provenance.commit() == "unknown" or len(provenance.commit()) in (40, 41)


def alone(code: str, **variables: str) -> str:
    """Output of a fresh Python without the type checker of the tests."""
    environ = {**os.environ, "EWC_DATA": os.environ.get("EWC_DATA") or "sample", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What the libraries themselves do when imported is theirs; everything after `before` would be the package's doing.
LOOK = """
import os, random, socket, sys, warnings
import cycler, jaxtyping, matplotlib, matplotlib.pyplot, mpl_toolkits.mplot3d, numpy, platformdirs
import scipy.stats, sympy, torch, torch.func

def look():
    return {
        "torch": torch.get_rng_state().tolist(), "numpy": repr(numpy.random.get_state()), "random": random.getstate(),
        "filters": list(warnings.filters), "style": dict(matplotlib.rcParams), "backend": matplotlib.get_backend(),
        "timeout": socket.getdefaulttimeout(), "environ": dict(os.environ), "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(), "print": repr(numpy.get_printoptions()), "hook": sys.excepthook,
        "deterministic": torch.are_deterministic_algorithms_enabled(), "figures": matplotlib.pyplot.get_fignums(),
    }

before = look()
"""


def test_importing_does_nothing() -> None:
    code = LOOK + (
        "import pkgutil, importlib, ewc_code\n"
        "names = [m.name for m in pkgutil.walk_packages(ewc_code.__path__, 'ewc_code.')]\n"
        "[importlib.import_module(name) for name in names]\n"
        "after = look()\n"
        "assert before == after, [key for key in before if before[key] != after[key]]\n"
        "assert 'torchvision' not in sys.modules\n"
        "print(len(names))\n"
    )
    assert int(alone(code, EWC_DATA="/nowhere/to/be/found", EWC_DEVICE="no such device", EWC_SCALE="none")) >= 13


def test_using_it_leaves_global_generators_and_settings_alone() -> None:
    code = LOOK + (
        "from ewc_code import consolidation, data, environment, fisher, laplace, metrics, models, tasks, training\n"
        "from ewc_code.gaussian import Diagonal\n"
        "data.torchvision_datasets()\n"
        "before = look()\n"
        "pair = tasks.permuted(tasks.limited(data.load('MNIST'), 200), 2)\n"
        "turned = tasks.rotated(pair[0].images, (10.0,))[0].train\n"
        "model = models.mlp((784, 8, 10)).to(environment.device())\n"
        "draw = environment.generator(0)\n"
        "for labels in fisher.LABELS: fisher.diagonal(model, pair[0].train, labels, draw)\n"
        "flat = Diagonal.isotropic(models.snapshot(model))\n"
        "belief = laplace.laplace(model, pair[0].train, flat)\n"
        "training.fit(model, pair[0].train, belief)\n"
        "training.learn(model, pair, consolidation.ewc(1.0), curve_points=2)\n"
        "after = look()\n"
        "assert before == after, [key for key in before if before[key] != after[key]]\n"
        "print('same')\n"
    )
    assert alone(code).strip() == "same"


def test_every_annotation_of_the_package_can_be_checked_at_run_time() -> None:
    names = [module.name for module in pkgutil.walk_packages(ewc_code.__path__, "ewc_code.")]
    for name in names:
        assert importlib.import_module(name).__doc__


def test_version_is_one() -> None:
    assert ewc_code.__version__.count(".") == 2
