r"""A small language model that learns Python and then English, and what keeps it from forgetting Python.

Both texts are on every machine that has Python: the standard library's source, and the documentation of its topics with
its licence. Chapter "Your own model".
"""

import copy
import math
import os
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ewc_code import fisher, metrics
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.gaussian import Belief, Diagonal
from ewc_code.laplace import laplace
from ewc_code.models import Params, Transformer, evaluating, nll, snapshot, transformer
from ewc_code.rehearsal import Buffer
from ewc_code.training import Settings, fit
from ewc_experiments.workers import one_thread, workers

#: Modules of every Python from 3.11 on, whose source is the first text.
MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "code", "codecs", "configparser", "copy", "csv", "dataclasses",
    "datetime", "difflib", "dis", "doctest", "enum", "fractions", "functools", "gettext", "heapq", "inspect",
    "ipaddress", "mailbox", "ntpath", "optparse", "os", "pdb", "pickle", "plistlib", "posixpath", "pprint", "pstats",
    "random", "selectors", "shelve", "shutil", "smtplib", "socket", "socketserver", "statistics", "string",
    "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "types", "typing", "uuid",
    "warnings", "weakref", "zipapp",
)  # fmt: skip
# What is not in it is one character more, written as a replacement character. (No `#:` here: on the API page a word
# of a hundred letters would break no line.)
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(ALPHABET) + 1
BLOCK = 1960  #: Characters that go to one part of the data together, so that neighbours are rarely in two parts.
LN2 = math.log(2)  #: Nats in a bit.


@dataclass(frozen=True)
class Language:
    """Settings of the comparison."""

    context: int = 32  #: Characters that the model sees.
    width: int = 32  #: Of its vectors.
    heads: int = 2  #: Of attention.
    depth: int = 2  #: Blocks.
    sequences: int = 16_000  #: Of the first text, at most.
    further: int = 4000  #: Of the second.
    held: int = 1000  #: Validation and test sequences, at most.
    settings: Settings = Settings(epochs=1, batch_size=8, learning_rate=5e-3)  #: On the first text.
    later: Settings = Settings(epochs=1, batch_size=8, learning_rate=3e-3)  #: On the second text.
    seeds: tuple[int, ...] = (0, 1, 2)  #: Of weights, which sequences, their order.
    examples: int = 1500  #: Sequences that the Fisher is taken from.
    kept: int = 100  #: Sequences of the first text that replay keeps, and that a Fisher of few is taken from.
    # Strengths, all of which are reported: placed around half of plain training's forgetting by validation data of a
    # seed (100) that is not among `seeds`.
    l2: tuple[float, ...] = (1.5e3, 6e3)
    ewc: tuple[float, ...] = (1.0, 4.0)
    replay: tuple[float, ...] = (0.03, 0.1)
    rank: int = 4  #: Of LoRA's matrices.

    @property
    def small(self) -> bool:
        """Whether the model is too small for two threads to share a step."""
        return self.width <= 128


LANGUAGE = {
    "smoke": Language(
        context=24, width=16, heads=2, depth=1, sequences=2000, further=1000, held=200, examples=200, kept=30,
        l2=(1e3, 5e3), ewc=(1.0, 5.0), replay=(0.1, 0.3),
    ),
    "laptop": Language(),
    "paper": Language(
        context=128, width=256, heads=8, depth=4, sequences=60_000, further=12_000, held=4000, examples=4000, kept=500,
        settings=Settings(epochs=4, batch_size=64, learning_rate=1e-3),
        later=Settings(epochs=4, batch_size=64, learning_rate=5e-4),
        seeds=(0, 1, 2, 3, 4), l2=(1e2, 1e3, 1e4, 1e5), ewc=(1.0, 10.0, 100.0, 1e3), replay=(0.03, 0.1, 0.3), rank=8,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def texts() -> dict[str, str]:
    """The two texts: 'Python', the source of `MODULES`, and 'English', the topics of the documentation and the licence.

    An OSError where this Python came without its library's source.
    """
    folder = Path(os.__file__).parent
    found = [path.read_text(encoding="utf-8") for name in MODULES if (path := folder / f"{name}.py").is_file()]
    if len(found) < len(MODULES) // 2:
        raise OSError(
            f"the source of the standard library must lie in {folder.name}/ beside os.py; only {len(found)} of "
            f"{len(MODULES)} modules are there. Use a Python that comes with its library's source."
        )
    licences = [folder / "LICENSE.txt", folder.parent / "LICENSE", Path(sysconfig.get_path("data")) / "LICENSE.txt"]
    licence = next((path.read_text(encoding="utf-8") for path in licences if path.is_file()), "")
    return {"Python": "".join(found), "English": "\n".join([*topics.values(), licence])}


def encoded(text: str) -> Int64[Tensor, " n"]:
    """Numbers of the characters; all that are not in `ALPHABET` are one."""
    numbers = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([numbers.get(character, len(ALPHABET)) for character in text])


def decoded(tokens: Int64[Tensor, " n"]) -> str:
    """The inverse of `encoded`."""
    return "".join((ALPHABET + "\N{REPLACEMENT CHARACTER}")[i] for i in tokens.tolist())


@dataclass(frozen=True)
class Text:
    """Sequences of one text; each position's label is the next character."""

    name: str
    train: Examples
    validation: Examples
    test: Examples


@lru_cache(maxsize=4)
def _parts(name: str, context: int) -> dict[str, Tensor]:
    """Sequences of context + 1 characters, (n, context + 1), of every tenth block for each held-out part."""
    tokens = encoded(texts()[name])
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for i, block in enumerate(tokens.split(BLOCK)):
        rows = len(block) // (context + 1)
        which = {4: "validation", 9: "test"}.get(i % 10, "train")
        parts[which].append(block[: rows * (context + 1)].view(rows, context + 1))
    return {part: torch.cat(blocks) for part, blocks in parts.items()}


def text(setup: Language, name: str, seed: int) -> Text:
    """So many sequences of a text, the training ones drawn by the seed, the others always the same."""
    count = setup.sequences if name == "Python" else setup.further
    some = {"train": count, "validation": setup.held, "test": setup.held}
    made = {}
    for part, sequences in _parts(name, setup.context).items():
        draw = generator(seed if part == "train" else 0)
        chosen = sequences[torch.randperm(len(sequences), generator=draw)[: some[part]]].to(device())
        made[part] = Examples(chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous())
    return Text(name, **made)


def bits(model: nn.Module, data: Examples, batch_size: int = 500) -> float:
    """Mean bits a character that the text takes when the model's probabilities write it: nll / log 2."""
    total = 0.0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(data), batch_size):
            batch = data[start : start + batch_size]
            total += nll(model(batch.x), batch.y).item() * len(batch)
    return total / len(data) / LN2


def network(setup: Language, seed: int) -> Transformer:
    """The model before it has read anything."""
    return transformer(VOCABULARY, setup.context, setup.width, setup.heads, setup.depth, seed).to(device())


class LowRank(nn.Module):
    r"""LoRA: W + B A in place of a frozen W, of which only A (r, in) and B (out, r), zero at first, are trained.

    Source: Hu et al. 2021, section 4.1 (their scale alpha / r is 1 here).
    """

    def __init__(self, weight: Tensor, rank: int, draw: torch.Generator) -> None:
        super().__init__()
        start = torch.randn(rank, weight.shape[1], generator=draw) / weight.shape[1] ** 0.5
        self.a = nn.Parameter(start.to(weight))
        self.b = nn.Parameter(weight.new_zeros(len(weight), rank))

    def forward(self, weight: Float[Tensor, "o i"]) -> Float[Tensor, "o i"]:
        """The weight with what was learned since."""
        return weight + self.b @ self.a


def adapted(model: Transformer, rank: int, seed: int = 0) -> Transformer:
    """A copy of the model of which only low-rank changes of the blocks' matrices can be trained."""
    model, draw = copy.deepcopy(model).requires_grad_(False), generator(seed)
    for name, module in list(model.named_modules()):
        if name.startswith("blocks.") and isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, draw))
    return model


#: What is believed after the first text, from the model, the text and the settings.
Made = Callable[[nn.Module, Text, Language, int], Belief]


def _flat(model: nn.Module, first: Text, setup: Language, seed: int) -> Belief:
    return Diagonal.isotropic(snapshot(model))


def _equal(model: nn.Module, first: Text, setup: Language, seed: int) -> Belief:
    return Diagonal.isotropic(snapshot(model), 1.0)


def _curved(model: nn.Module, first: Text, setup: Language, seed: int) -> Belief:
    """Believed after the first text, from drawn labels; N counts all its characters, however few are looked at."""
    return _believed(model, first.train[: setup.examples], "sampled", seed, first.train.count)


def _few(model: nn.Module, first: Text, setup: Language, seed: int) -> Belief:
    """The same from few sequences, none of them among those of `_curved`."""
    kept = first.train[setup.examples : setup.examples + setup.kept]
    return _believed(model, kept, "sampled", seed + 1, first.train.count)


def _own_words(model: nn.Module, first: Text, setup: Language, seed: int) -> Belief:
    """From what the model writes itself: the labels are drawn with the text, so they need no second draw."""
    assert isinstance(model, Transformer)
    return _believed(model, own_words(model, min(setup.examples, 500), seed), "data", seed, first.train.count)


def _believed(model: nn.Module, part: Examples, labels: fisher.Labels, seed: int, count: int) -> Diagonal:
    """As if the mean Fisher of the part were that of so many characters."""
    with evaluating(model):
        found = laplace(model, part, Diagonal.isotropic(snapshot(model)), labels, generator(seed))
    return Diagonal(found.mean, {name: count / part.count * value for name, value in found.precision.items()})


def _replayed(model: nn.Module, first: Text, setup: Language, seed: int) -> Belief:
    return Buffer.extended(None, copy.deepcopy(model), first.train, setup.kept, seed, setup.later.batch_size)


def methods(setup: Language) -> dict[str, tuple[Made, tuple[float, ...]]]:
    """By name: what is believed, and with which strengths the second text is read.

    The two that have no data of the first text are read with the larger of EWC's strengths alone.
    """
    return {
        "plain": (_flat, (0.0,)),
        "L2": (_equal, setup.l2),
        "EWC": (_curved, setup.ewc),
        "replay": (_replayed, setup.replay),
        "EWC, few": (_few, setup.ewc[-1:]),
        "EWC, own words": (_own_words, setup.ewc[-1:]),
    }


@dataclass
class Reading:
    """Bits a character on the test sequences of the two texts, by name."""

    Python: float
    English: float


@dataclass
class Life:
    """One seed: a model that reads Python, and then English in several ways."""

    fresh: Reading  #: Before it reads anything.
    first: Reading  #: After Python.
    written: dict[str, str]  #: What it writes after "Python", and after English with each method at its last strength.
    shares: dict[str, float]  #: Of the Fisher's trace, by part of the network.
    each: dict[str, float]  #: Mean Fisher of a parameter of the part over that of all parameters.
    alike: dict[str, float]  #: Cosine of other estimates with that Fisher.
    later: dict[str, dict[float, Reading]] = field(default_factory=dict)  #: After English, by method and strength.
    trained: dict[str, int] = field(default_factory=dict)  #: Parameters that English may change, by method.

    @property
    def half(self) -> float:
        """Bits a character on Python when half of what plain training forgets is forgotten."""
        return (next(iter(self.later["plain"].values())).Python + self.first.Python) / 2

    def at(self, method: str, python: float) -> float:
        """Bits a character on English where the method has so many on Python, read off the line through its strengths.

        The line begins at plain training and ends at not reading English at all; beyond its ends, their value.
        """
        line = [*self.later["plain"].values(), *(r for _, r in sorted(self.later[method].items())), self.first]
        for here, there in pairwise(line):
            if here.Python >= python >= there.Python and here.Python > there.Python:
                share = (here.Python - python) / (here.Python - there.Python)
                return here.English + share * (there.English - here.English)
        return line[0].English if python > line[0].Python else line[-1].English


def compare(setup: Language, progress: Callable[[str], None] = lambda _: None) -> list[Life]:
    """Everything on fresh test data, a life a seed; nothing is chosen, every strength is reported."""
    with workers(setup.small) as pool:
        begun = {seed: pool(_first, setup, seed) for seed in setup.seeds}
        lives: list[Life] = []
        waiting = []
        for seed, result in begun.items():
            life, model = result()
            lives.append(life)
            for name, (_, strengths) in methods(setup).items():
                waiting += [(life, name, s, pool(_second, setup, seed, model, name, s)) for s in strengths]
            waiting.append((life, "LoRA", 0.0, pool(_adapted, setup, seed, model)))
        progress(f"{len(lives)} models have read Python")
        for life, name, strength, result in waiting:
            reading, life.written[name], life.trained[name] = result()
            life.later.setdefault(name, {})[strength] = reading
        progress(f"and English, {len(waiting)} readings in all")
    return lives


def read_first(setup: Language, seed: int) -> Transformer:
    """A model that has read the first text."""
    model, one = network(setup, seed), text(setup, "Python", seed)
    flat = Diagonal.isotropic(snapshot(model))
    with one_thread(setup.small):
        fit(model, one.train, flat, 0.0, setup.settings, generator(seed), name="Python")
    return model


def _first(setup: Language, seed: int) -> tuple[Life, Transformer]:
    model, one = read_first(setup, seed), text(setup, "Python", seed)
    beliefs = {name: make(model, one, setup, seed) for name, make in (("EWC", _curved), ("few", _few),
               ("own words", _own_words))}  # fmt: skip
    precision = {name: belief.precision for name, belief in beliefs.items() if isinstance(belief, Diagonal)}
    alike = {name: metrics.cosine(value, precision["EWC"]) for name, value in precision.items() if name != "EWC"}
    written = {"Python": _written(setup, model, seed)}
    return Life(
        _reading(setup, network(setup, seed)), _reading(setup, model), written, *parts(precision["EWC"]), alike
    ), model


def _second(setup: Language, seed: int, model: Transformer, name: str, strength: float) -> tuple[Reading, str, int]:
    belief = methods(setup)[name][0](model, text(setup, "Python", seed), setup, seed)
    return _after(setup, copy.deepcopy(model), belief, strength, seed)


def _adapted(setup: Language, seed: int, model: Transformer) -> tuple[Reading, str, int]:
    small = adapted(model, setup.rank, seed)
    return _after(setup, small, Diagonal.isotropic(snapshot(small)), 0.0, seed)


def _after(setup: Language, model: Transformer, belief: Belief, strength: float, seed: int) -> tuple[Reading, str, int]:
    """Read the second text in place; what comes of it."""
    data = text(setup, "English", seed).train
    fit(model, data, belief, strength, setup.later, generator(seed), name="English")
    return _reading(setup, model), _written(setup, model, seed), sum(p.numel() for p in snapshot(model).values())


def _reading(setup: Language, model: nn.Module) -> Reading:
    return Reading(*(bits(model, text(setup, name, 0).test) for name in ("Python", "English")))


def _written(setup: Language, model: Transformer, seed: int) -> str:
    """Eight lines or so, after the beginning of a test sequence of Python."""
    start = text(setup, "Python", seed).test.x[:1, :16]
    return decoded(write(model, start, 240, generator(seed))[0])


@torch.no_grad()
def write(model: Transformer, start: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """The start (n, t) and `count` tokens more, (n, t + count), drawn one by one from the model's own distribution."""
    for _ in range(count):
        probs = model(start[:, -model.context :])[:, -1].softmax(1)
        drawn = torch.multinomial(probs.cpu(), 1, generator=draw).to(start.device)
        start = torch.cat([start, drawn], dim=1)
    return start


def own_words(model: Transformer, count: int, seed: int) -> Examples:
    """Sequences that the model writes itself, from one newline each: data where no data is left."""
    start = torch.zeros(count, 1, dtype=torch.int64, device=next(model.parameters()).device)
    found = write(model, start, model.context, generator(seed))
    return Examples(found[:, :-1].contiguous(), found[:, 1:].contiguous())


def part_of(name: str) -> str:
    """The part of the transformer that a parameter belongs to, in words; blocks are counted from 1."""
    head, _, rest = name.partition(".")
    if head == "blocks":
        number, _, inner = rest.partition(".")
        kind = inner.split(".")[0]
        what = {"attention": "attention", "feed": "feed-forward"}.get(kind, "norms")
        return f"{what} {int(number) + 1}"
    return {"token": "characters", "place": "places", "norm": "last norm", "head": "output"}[head]


def parts(precision: Params) -> tuple[dict[str, float], dict[str, float]]:
    """Share of a diagonal's trace by part of the network; and the mean of a part's entries over the mean of all."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, value in precision.items():
        part = part_of(name)
        sums[part] = sums.get(part, 0.0) + value.sum().item()
        counts[part] = counts.get(part, 0) + value.numel()
    total, count = sum(sums.values()), sum(counts.values())
    shares = {part: value / total for part, value in sums.items()}
    return shares, {part: (sums[part] / counts[part]) / (total / count) for part in sums}
