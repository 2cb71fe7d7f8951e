"""Beliefs as files: safetensors, which hold numbers and text and can run nothing when they are read.

A file carries the kind of belief and the names and shapes of the parameters that it is about; one that does not fit the
model is refused with the first name that differs, one that was altered by its checksum. Chapter "Your own model".
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ewc_code.fisher import Factors
from ewc_code.gaussian import Belief, Diagonal, Full, Kronecker, Penalties
from ewc_code.models import Params, restore, snapshot
from ewc_code.rehearsal import Answers, Buffer, Question

FORMAT = "ewc_code belief 2"


def numbers(belief: Belief) -> int:
    """How many numbers have to be kept for a belief: what it costs in memory, beside the model itself."""
    if isinstance(belief, Diagonal) and not any(value.any() for value in belief.precision.values()):
        return 0  # the flat belief knows nothing, wherever it is centred
    if isinstance(belief, Penalties):
        return sum(map(numbers, belief.parts))
    return sum(value.numel() for name, value in _parts(belief)[1].items() if name != "draw")  # a generator's state


def save(belief: Belief, path: Path | str) -> None:
    """Write a belief to a file, at once and whole: what was there stays until the new one is complete.

    A ValueError for a kind of belief that the package does not know; an OSError where it cannot be written.
    """
    path = Path(path)
    described, tensors = _parts(belief)
    about, part = json.dumps(described), path.with_name(f"{path.name}.{os.getpid()}.part")
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    try:
        save_file(whole, part, {"format": FORMAT, "about": about, "sha256": _checksum(about, whole)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the belief could not be written to {path}: {error}. Free space, or choose a folder.") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path | str, model: nn.Module) -> Belief:
    """The belief in a file, for this model and on its device; the model is left as it is.

    A ValueError: no belief file, or one that is damaged or about other parameters than the model's.
    """
    mode, path, where = snapshot(model), Path(path), next(model.parameters()).device
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            if described.get("format") != FORMAT:
                raise ValueError(f"{path} must hold a belief ({FORMAT!r}); got {described.get('format')!r}.")
            # Copies: what is read lies where the file has it, and other alignment is other rounding.
            tensors = {name: file.get_tensor(name).to(where, copy=True) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be a whole safetensors file; reading failed ({error}). Make it anew.") from error
    if described.get("sha256") != _checksum(about := described.get("about", ""), tensors):
        raise ValueError(f"{path} must be as it was written; its content was altered since. Make it again.")
    return _whole(json.loads(about), tensors, model, mode)


def _checksum(about: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 of everything that a belief is made from, whatever the order in the file."""
    digest = hashlib.sha256(about.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(belief: Belief) -> tuple[dict, dict[str, Tensor]]:
    """What a belief is, as JSON, and its numbers by name."""
    kind = type(belief).__name__
    if isinstance(belief, Diagonal):
        return {"kind": kind}, _under("mean", belief.mean) | _under("precision", belief.precision)
    if isinstance(belief, Full):
        return {"kind": kind, "order": list(belief.mean)}, _under("mean", belief.mean) | {"precision": belief.precision}
    if isinstance(belief, Kronecker):
        tensors, terms = _under("mean", belief.mean), {name: len(found) for name, found in belief.factors.items()}
        for layer, found in belief.factors.items():
            for i, term in enumerate(found):
                tensors |= {f"inputs/{i}/{layer}": term.inputs, f"outputs/{i}/{layer}": term.outputs}
        return {"kind": kind, "terms": terms}, tensors
    if isinstance(belief, Penalties):
        tensors = {}
        for i, part in enumerate(belief.parts):
            tensors |= _under(f"mean/{i}", part.mean) | _under(f"precision/{i}", part.precision)
        return {"kind": kind, "parts": len(belief.parts)}, tensors
    if isinstance(belief, Answers):
        asked = [dataclasses.asdict(question) for question in belief.questions]
        return {"kind": kind, "questions": asked, "temperature": belief.temperature}, _under("mean", belief.mode)
    if isinstance(belief, Buffer):
        kept = {"x": belief.x, "y": belief.y, "share": belief.share, "draw": belief.draw.get_state()}
        shapes = {name: value.shape for name, value in snapshot(belief.model).items()}
        return {"kind": kind, "batch_size": belief.batch_size, "shapes": shapes}, kept
    raise ValueError(f"beliefs of the package can be saved; got {kind}.")


def _whole(about: dict, tensors: dict[str, Tensor], model: nn.Module, mode: Params) -> Belief:
    """The inverse of `_parts`."""
    kind = about["kind"]
    if kind == "Buffer":
        _same({name: tuple(shape) for name, shape in about["shapes"].items()}, mode)
        draw = torch.Generator()
        draw.set_state(tensors["draw"].cpu())
        return Buffer(model, tensors["x"], tensors["y"], tensors["share"].cpu(), draw, about["batch_size"])
    if kind == "Penalties":
        each = [(_of(f"mean/{i}", tensors, mode), _of(f"precision/{i}", tensors, mode)) for i in range(about["parts"])]
        return Penalties(tuple(Diagonal(mean, precision) for mean, precision in each))
    mean = _of("mean", tensors, mode)
    if kind == "Diagonal":
        return Diagonal(mean, _of("precision", tensors, mode))
    if kind == "Full":
        return Full(
            {name: mean[name] for name in about.get("order", mean)}, tensors["precision"]
        )  # the matrix has its order
    if kind == "Kronecker":
        terms = {
            layer: tuple(Factors(tensors[f"inputs/{i}/{layer}"], tensors[f"outputs/{i}/{layer}"]) for i in range(count))
            for layer, count in about["terms"].items()
        }
        return Kronecker(mean, terms)
    if kind == "Answers":
        asked = tuple(Question(q["head"], tuple(q["classes"]), q["n"]) for q in about["questions"])
        belief = Answers.of(model, asked, about["temperature"])
        restore(belief.model, mean)
        return belief
    raise ValueError(f"the file holds a belief of a kind that this version does not know: {kind!r}.")


def _under(prefix: str, params: Params) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": value for name, value in params.items()}


def _of(prefix: str, tensors: dict[str, Tensor], mode: Params) -> Params:
    """The tensors under a prefix, in the model's order, after checking that they are the model's."""
    found = {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}/")}
    _same({name: tuple(value.shape) for name, value in found.items()}, mode)
    return {name: found[name] for name in mode}


def _same(found: dict[str, tuple[int, ...]], mode: Params) -> None:
    """Refuse the shapes of another model, by the first name that differs."""
    for name in [*mode, *found]:
        have, want = found.get(name, "absent"), tuple(mode[name].shape) if name in mode else "absent"
        if have != want:
            raise ValueError(f"the belief must be about this model; parameter {name!r}: file {have}, model {want}.")
