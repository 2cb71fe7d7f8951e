"""A device that is not the CPU, on the CPU: a tensor that is not where it has to be is found out on any machine.

Its tensors are of a type that torch keeps for others' hardware, and hold a CPU tensor each, which does the work. Like
an accelerator it refuses to mix its tensors with the CPU's, to draw from the CPU's generators and to give its memory to
numpy; within `without` it refuses types of numbers too, as Apple's MPS does float64. It is slow, and it says nothing of
an accelerator's kernels.

    EWC_DEVICE=standin pytest tests/test_fisher.py        any test of the package, on this device (`make test-device`)

What it stands on is experimental in torch (`_setup_privateuseone_for_python_backend`); it serves the tests alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "standin"
ROOM = 2**40  # bytes that a tensor is said to have, so that it may grow in place; none are taken
aten = torch.ops.aten
# What a device takes from the host, and gives back to it.
ACROSS = {aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default}
# Indices may lie on the host, as CUDA has it.
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
refused: set[torch.dtype] = set()
_kept: list[Library] = []  # a library that is collected takes its kernels along


class Held(Tensor):
    """A tensor of the device; `held` is the CPU tensor that it stands for."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "Held":
        if held._is_zerotensor():  # autograd's own zeros, which have no memory
            held = torch.zeros(held.shape, dtype=held.dtype)
        if held.dtype in refused:
            raise TypeError(f"{NAME} has no {held.dtype}")
        place = {"strides": held.stride(), "storage_offset": held.storage_offset(), "storage_size": ROOM}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=torch.device(NAME, 0), **place)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, _types, arguments=(), named=None):
        return run(function, arguments, named or {})

    # These let `Module.to` exchange a parameter for one of another device.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _meta: None, _size: object, _stride: object) -> "Held":
        return Held(inner["held"])

    # A plain tensor of an accelerator can do all of this, which torch refuses to tensors of others' types.
    def __getitem__(self, index: object) -> Tensor:
        one = lambda part: torch.tensor(part) if isinstance(part, list) else part  # noqa: E731
        return super().__getitem__(tuple(map(one, index)) if isinstance(index, tuple) else one(index))

    def tolist(self) -> object:
        return self.held.tolist()

    def __repr__(self, **_: object) -> str:
        return f"{NAME} {self.held!r}"

    def __format__(self, how: str) -> str:
        return format(self.item() if self.dim() == 0 else self.held, how)


def run(function, arguments, named):
    """The operation on the tensors that are held, after a look at where all of them are."""
    leaves = tree_leaves((arguments, named))
    ours = [leaf for leaf in leaves if isinstance(leaf, Held)]
    hosts = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, Held)]
    if function in INDEXING:
        hosts = [leaf for leaf in hosts if leaf is arguments[0] or any(leaf is other for other in arguments[2:])]
    if function not in ACROSS and any(tensor.dim() > 0 for tensor in hosts):  # a number alone may be anywhere
        raise RuntimeError(f"Expected all tensors to be on the same device; {function} got cpu and {NAME}")
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    asked = next((leaf.type for leaf in leaves if isinstance(leaf, torch.device)), None)
    there = asked == NAME if asked else bool(ours)
    if function is aten.copy_.default:
        there = isinstance(arguments[0], Held)

    def here(leaf):
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.held if isinstance(leaf, Held) else leaf

    answer = function(*tree_map(here, arguments), **tree_map(here, named))
    for leaf in ours:
        if (leaf.shape, leaf.stride()) != (leaf.held.shape, leaf.held.stride()):
            # Worked in place, and gave it another shape.
            place = leaf.held.shape, leaf.held.stride(), leaf.held.storage_offset()
            aten.as_strided_.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutogradNonFunctional, leaf, *place)
    known = {} if function.is_view else {id(leaf.held): leaf for leaf in ours}  # in place: what came goes back

    def back(value):
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else Held(value) if there else value

    return tree_map(back, answer)


class Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.standin`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)  # nothing is drawn on the device

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        pass


def install() -> torch.device:
    """The device, made known to this process once."""
    if not _kept:
        backend_registration._setup_privateuseone_for_python_backend(rename=NAME, backend_module=Module())
        library = Library("_", "IMPL")
        library.fallback(lambda function, *arguments, **named: run(function, arguments, named), "PrivateUse1")
        library.fallback(fallthrough_kernel, "AutocastPrivateUse1")
        _kept.append(library)
        # These two fill memory behind the dispatcher's back.
        torch.tensor, torch.as_tensor = _by_way_of_the_host(torch.tensor), _by_way_of_the_host(torch.as_tensor)
    return torch.device(NAME, 0)


def _by_way_of_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(value: object, *, device: torch.device | str | None = None, **named: object) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(value, device=device, **named)
        return make(value, **named).to(device)

    return made


@contextmanager
def without(*kinds: torch.dtype) -> Iterator[None]:
    """Within, the device has no tensors of these types."""
    refused.update(kinds)
    try:
        yield
    finally:
        refused.clear()
