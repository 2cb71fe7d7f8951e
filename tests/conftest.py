"""Shapes and types in the package's signatures are checked whenever a test calls it."""

import torch
from jaxtyping import install_import_hook

# Before the first import of the package, or nothing is checked.
install_import_hook(["ewc_code", "ewc_plots"], "typechecker.typechecked")

# The tests' tensors are tiny: on a busy machine a second thread is waited for longer than it helps.
torch.set_num_threads(1)
