r"""Beliefs that are not Gaussian: some of the old examples themselves, or what the network answered before.

Both are read as beliefs: an energy that stands for the negative log likelihood of the old data, which the loop adds to
that of the new. Chapter "Where it fails".
"""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ewc_code.data import Examples
from ewc_code.models import MultiHead, Params, nll, snapshot


@dataclass(frozen=True)
class Buffer:
    r"""Some examples of each old task, for experience replay; with all of them it is joint training.

        energy(theta) = n * mean over a random batch of -log p_theta(y | x),   n = number of all old examples

    An example stands for as many as its task had for each that was kept, and is drawn in that proportion: so the energy
    is an unbiased estimate of the old tasks' negative log likelihood where their examples were kept at random.
    Source: Robins 1995; Chaudhry et al. 2019. Chapter "Where it fails".
    """

    model: nn.Module  #: Whose likelihood it is; its parameters are replaced by those that the energy is asked for.
    x: Tensor  #: Inputs, (m, ...).
    y: Tensor  #: Labels, (m,).
    share: Float[Tensor, " m"]  #: Examples that each stands for; their sum is n.
    draw: torch.Generator  #: Of the batches, on the CPU; each energy asked for moves it on.
    batch_size: int = 128  #: Examples looked at for one energy, at most.

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """The class's formula, nats, from another batch at each call."""
        some = min(self.batch_size, len(self.y))
        index = torch.multinomial(self.share, some, replacement=True, generator=self.draw).to(self.x.device)
        return self.share.sum().item() * nll(functional_call(self.model, theta, (self.x[index],)), self.y[index])

    @classmethod
    def extended(
        cls, before: object, model: nn.Module, data: Examples, examples: int | None, seed: int, batch_size: int
    ) -> "Buffer":
        """`before`, a buffer or a belief that knows nothing, and so many random examples of the data; None for all."""
        if examples is not None and examples < 1:
            raise ValueError(f"at least 1 example a task must be kept; got {examples}.")
        old = before if isinstance(before, cls) else None
        draw = old.draw if old else torch.Generator().manual_seed(seed)
        kept = (
            data if examples is None else data[torch.randperm(len(data), generator=draw)[:examples].to(data.y.device)]
        )
        share = torch.full((len(kept),), data.count / len(kept))
        parts = [(old.x, old.y, old.share), (kept.x, kept.y, share)] if old else [(kept.x, kept.y, share)]
        x, y, share = (torch.cat(column) for column in zip(*parts, strict=True))
        return cls(model, x, y, share, draw, batch_size)


@dataclass(frozen=True)
class Question:
    """What old tasks asked: among these classes, by one head of the network or by all it has."""

    head: int | None  #: Of a `models.MultiHead`, else None.
    classes: tuple[int, ...]
    n: int  #: Examples that asked it.


@dataclass(frozen=True)
class Answers:
    r"""What the network answered to the old tasks' questions before, for learning without forgetting (LwF).

        energy(theta; x) = sum_q n_q T^2 mean_x CE(softmax(a*_q(x) / T), softmax(a_q(x) / T))

    a* are the logits of the network as it was, among the classes of question q, and x the NEW task's inputs: as if the
    n_q old examples had been these, labelled by the old network: at T = 1; else both are softened by the temperature T,
    and T^2 keeps the gradient's size.
    Source: Li & Hoiem 2016, eqs. 2-3; Hinton et al. 2015 (T^2). Chapter "Where it fails".
    """

    model: nn.Module  #: A copy, in evaluation mode, with the parameters of that time.
    questions: tuple[Question, ...]
    temperature: float = 2.0

    def energy(self, theta: Params, x: Tensor | None = None) -> Tensor:
        """The class's formula, nats; without inputs there is nothing to compare."""
        if x is None:
            raise ValueError("what a network answers can only be compared on inputs; got None. Give x, (b, ...).")
        heads = isinstance(self.model, MultiHead)  # all of them answer at once, so that the trunk runs once
        total, every = next(iter(theta.values())).new_zeros(()), {"every": True} if heads else {}
        with torch.no_grad():
            before = self.model(x, **every)
        now = functional_call(self.model, theta, (x,), every)
        for question in self.questions:
            old, new = (
                (a[:, question.head] if heads else a)[..., list(question.classes)] / self.temperature
                for a in (before, now)
            )
            cross = -(old.softmax(-1) * new.log_softmax(-1)).sum(-1).mean()
            total = total + question.n * self.temperature**2 * cross
        return total

    @classmethod
    def extended(cls, before: object, model: nn.Module, data: Examples, temperature: float) -> "Answers":
        """All questions so far, those of the data included, and the network as it answers them now."""
        if not temperature > 0:
            raise ValueError(f"the temperature must be above 0; got {temperature}.")
        known = {q.head: q for q in before.questions} if isinstance(before, cls) else {}
        head = int(data.x[0, -1]) if isinstance(model, MultiHead) else None
        old = known.get(head, Question(head, (), 0))
        classes = tuple(sorted({*old.classes, *data.y.unique().tolist()}))
        known[head] = Question(head, classes, old.n + data.count)
        return cls.of(model, tuple(known.values()), temperature)

    @classmethod
    def of(cls, model: nn.Module, questions: tuple[Question, ...], temperature: float) -> "Answers":
        """What a model answers now: a copy of it is kept, in evaluation mode; frozen parts stay marked as such."""
        return cls(copy.deepcopy(model).eval(), questions, temperature)

    @property
    def mode(self) -> Params:
        """The parameters of that time."""
        return snapshot(self.model)
