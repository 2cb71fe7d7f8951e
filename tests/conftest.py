"""Shapes and types in the package's signatures are checked whenever a test calls it."""

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import install_import_hook

# Before the first import of the package, or nothing is checked.
install_import_hook(["ewc_code", "ewc_checks", "ewc_experiments", "ewc_plots"], "typechecker.typechecked")

# The tests' tensors are tiny: on a busy machine a second thread is waited for longer than it helps.
torch.set_num_threads(1)

# Where only the package and its tests' needs are installed, the tests of the book cannot even be read.
if importlib.util.find_spec("sphinx") is None:
    of_the_book = ("apparatus", "browser", "build", "colab", "notebooks", "pages", "pdf", "play", "site")
    collect_ignore = [f"test_{name}.py" for name in of_the_book]


@pytest.fixture(scope="module")
def data_at_hand() -> Iterator[None]:
    """The full data where `EWC_DATA` says where they are, else the sample: experiments are not tested on a download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EWC_DATA", os.environ.get("EWC_DATA") or "sample")
        yield
