"""Shapes and types in the package's signatures are checked whenever a test calls it."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import stand_in
import torch
from jaxtyping import install_import_hook

# Before the first import of the package, or nothing is checked.
install_import_hook(["ewc_code", "ewc_checks", "ewc_experiments", "ewc_plots"], "typechecker.typechecked")

# `EWC_DEVICE=standin pytest` runs every test on a device that is not the CPU, whatever this machine has.
ON_STAND_IN = os.environ.get("EWC_DEVICE") == stand_in.NAME
if ON_STAND_IN:
    stand_in.install()

# The tests' tensors are tiny: on a busy machine a second thread is waited for longer than it helps.
torch.set_num_threads(1)

# Where only the package and its tests' needs are installed, the tests of the book cannot even be read.
if importlib.util.find_spec("sphinx") is None:
    of_the_book = ("apparatus", "browser", "build", "colab", "notebooks", "pages", "pdf", "play", "site", "unchanged")
    collect_ignore = [f"test_{name}.py" for name in of_the_book]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the stand-in: all but what is marked; elsewhere: all but what is about it."""
    reason = "not on the stand-in device" if ON_STAND_IN else "on the stand-in device: make test-device"
    for item in items:
        if item.get_closest_marker("host" if ON_STAND_IN else "standin"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def data_at_hand() -> Iterator[None]:
    """The full data where `EWC_DATA` says where they are, else the sample: experiments are not tested on a download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWC_DATA", os.environ.get("EWC_DATA") or "sample")
        yield
