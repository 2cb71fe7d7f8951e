"""The chapter "Your own model": the reader's loop, batch normalisation, the language model and its trades."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ewc_code import fisher
from ewc_code.data import Examples
from ewc_code.environment import device, generator
from ewc_code.laplace import laplace
from ewc_code.models import flatten, nll, restore, snapshot
from ewc_experiments import language, own
from ewc_experiments.language import LANGUAGE, Language, Life, Reading
from ewc_experiments.own import OWN, Own
from ewc_experiments.workers import one_thread, workers

TINY = Own(
    (2, 3), train_limit=60, held_limit=40, epochs=1, batch_size=20, examples=40, few=10, seeds=(0, 1), ewc=(1.0, 9.0)
)
WORDS = Language(
    context=8, width=8, heads=2, depth=1, sequences=64, further=32, held=20, seeds=(0,), examples=16, kept=8
)


def network(seed: int = 0) -> nn.Module:
    return own.network(TINY, seed)


def images(n: int = 30) -> Examples:
    draw = generator(0)
    return Examples(
        torch.rand(n, 784, generator=draw).to(device()), torch.randint(0, 10, (n,), generator=draw).to(device())
    )


def test_settings_report_no_seed_that_chooses() -> None:
    for setup in (*OWN.values(), TINY):
        assert not set(setup.seeds) & set(setup.choosing)
    assert OWN.keys() == LANGUAGE.keys() == {"smoke", "laptop", "paper"}
    assert min(len(setup.seeds) for setup in (*OWN.values(), *LANGUAGE.values())) >= 3


@pytest.mark.usefixtures("data_at_hand")
def test_five_lines_are_the_packages_own_objective() -> None:
    """One full batch of gradient descent by the reader's loop, written out."""
    model, data = network().double().eval(), images()
    data = Examples(data.x.double(), data.y)
    belief = laplace(model, [(data.x, data.y)], own.flat(model))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    expected = nll(model(data.x), data.y) + 5 / len(data) * belief.energy(dict(model.named_parameters()))
    by_hand = torch.autograd.grad(expected, list(model.parameters()))
    loss = F.cross_entropy(model(data.x), data.y)
    loss = loss + 5 / len(data) * sum(
        (belief.precision[n] * (p - belief.mean[n]) ** 2).sum() / 2 for n, p in model.named_parameters()
    )
    found = torch.autograd.grad(loss, list(model.parameters()))
    for one, two in zip(found, by_hand, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_moved_statistics_are_moved_parameters() -> None:
    model, data = network().double(), images(64)
    data = Examples(data.x.double(), data.y)
    model.train()
    model(data.x)
    model.eval()
    moved = copy.deepcopy(model).train()
    moved(1 - data.x)
    moved.eval()
    same = copy.deepcopy(model)
    restore(same, own.absorbed(model, own.statistics(moved)))
    torch.testing.assert_close(same(data.x), moved(data.x), rtol=1e-10, atol=1e-10)
    assert (model(data.x) - moved(data.x)).abs().max() > 1e-3
    torch.testing.assert_close(own.with_statistics(moved, own.statistics(model))(data.x), model(data.x))


def test_frozen_statistics_stay_and_dropout_goes_on() -> None:
    model = network().train()
    before = own.statistics(model)
    own.freeze_statistics(model)
    model(images().x)
    assert all(torch.equal(value, before[name]) for name, value in own.statistics(model).items())
    assert any(module.training for module in model.modules() if isinstance(module, nn.Dropout))


@pytest.mark.usefixtures("data_at_hand")
def test_the_loop_learns_and_comes_again_and_leaves_the_global_generator() -> None:
    setup, state, results = TINY, torch.get_rng_state(), []
    for _ in range(2):
        model, old, _ = own.learned_old(setup, 0)
        results.append(flatten(snapshot(model)))
    assert torch.equal(*results)
    assert torch.equal(torch.get_rng_state(), state)
    assert old.n == 60
    assert not model.training


@pytest.mark.usefixtures("data_at_hand")
def test_beliefs_from_stand_ins_speak_of_all_old_images() -> None:
    model, old, new = own.learned_old(TINY, 0)
    beliefs = own.stand_ins(TINY, model, old, new, 0)
    assert list(beliefs) == list(own.SOURCES)
    _x, y = next(iter(copy.deepcopy(old.train)))
    assert len(y) == TINY.batch_size
    noise = torch.rand(40, 784, generator=generator(0))
    drawn = [noise[:20], noise[20:]]
    means = [
        fisher.diagonal(model, Examples(part.to(device()), torch.zeros(20, dtype=torch.int64, device=device())))
        for part in drawn
    ]
    for name, value in beliefs["noise"].precision.items():
        torch.testing.assert_close(value, 60 * (means[0][name] + means[1][name]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("data_at_hand")
def test_heads_and_comparison_run_with_the_settings_given() -> None:
    setup = Own(
        (2, 3), train_limit=80, held_limit=40, epochs=1, batch_size=20, examples=20, few=10, seeds=(0,), ewc=(1.0,)
    )
    found = own.compare(setup)
    assert set(found.tried) == {1.0}
    assert {"plain", "EWC", "EWC, noise"} <= set(found.stories[0].after)
    heads = own.heads(setup, (10.0,))
    assert heads.strength == 10.0
    assert len(heads.accuracy["EWC"]) == 1


def test_overhead_measures_both_and_leaves_the_model() -> None:
    model, data = network().eval(), images(20)
    before = flatten(snapshot(model)).clone()
    found = own.overhead(model, lambda m: nll(m(data.x), data.y), repeats=3)
    assert found.plain > 0
    assert found.ratio == found.ewc / found.plain
    assert torch.equal(flatten(snapshot(model)), before)


# The language model


def test_texts_are_there_and_come_back() -> None:
    texts = language.texts()
    assert all(len(text) > 100_000 for text in texts.values())
    assert "def " in texts["Python"]
    some = "def f(x):\n    return x"
    assert language.decoded(language.encoded(some)) == some
    assert language.encoded("é").tolist() == [language.VOCABULARY - 1]


def test_parts_share_no_block_and_labels_are_the_next_characters() -> None:
    one = language.text(WORDS, "Python", 0)
    assert torch.equal(one.train.x[:, 1:], one.train.y[:, :-1])
    parts = language._parts("Python", WORDS.context)
    whole = language.encoded(language.texts()["Python"])
    size = language.BLOCK // (WORDS.context + 1)
    assert torch.equal(parts["validation"][0], whole[4 * language.BLOCK :][: WORDS.context + 1])
    assert torch.equal(parts["test"][size], whole[19 * language.BLOCK :][: WORDS.context + 1])
    again = language.text(WORDS, "Python", 1)
    assert torch.equal(again.test.x, one.test.x)
    assert not torch.equal(again.train.x, one.train.x)


def test_bits_are_mean_nats_over_log_two() -> None:
    model, data = language.network(WORDS, 0), language.text(WORDS, "English", 0).test
    assert language.bits(model, data, 7) == pytest.approx(nll(model(data.x), data.y).item() / 0.6931472, rel=1e-5)


def test_low_rank_changes_begin_at_nothing_and_train_nothing_else() -> None:
    model = language.network(WORDS, 0)
    small, x = language.adapted(model, 2), language.text(WORDS, "Python", 0).test.x
    torch.testing.assert_close(small(x), model(x))
    trained = snapshot(small)
    assert all(".parametrizations.weight.0." in name for name in trained)
    assert len(trained) == 2 * 4  # two matrices for each of a block's four
    assert all(p.requires_grad for p in model.parameters())


def test_own_words_are_of_the_models_distribution() -> None:
    model = language.network(WORDS, 0)
    written = language.own_words(model, 12, 3)
    assert written.x.shape == (12, WORDS.context)
    assert torch.equal(written.x[:, 1:], written.y[:, :-1])
    assert not written.x[:, 0].any()


def test_parts_of_the_network_share_the_trace() -> None:
    precision = {n: torch.full_like(v, 2.0) for n, v in snapshot(language.network(WORDS, 0)).items()}
    shares, each = language.parts(precision)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(value == pytest.approx(1) for value in each.values())
    assert set(shares) == {"characters", "places", "attention 1", "feed-forward 1", "norms 1", "last norm", "output"}


def test_trade_is_read_off_the_line() -> None:
    life = Life(Reading(6, 6), Reading(2, 5), {}, {}, {}, {})
    life.later = {"plain": {0.0: Reading(4, 3)}, "EWC": {1.0: Reading(3.5, 3.5), 9.0: Reading(2.5, 4.5)}}
    assert life.half == 3
    assert life.at("EWC", 3) == 4
    assert life.at("EWC", 3.75) == 3.25
    assert life.at("EWC", 2.25) == 4.75
    assert life.at("EWC", 5) == 3
    assert life.at("EWC", 1) == 5


@pytest.mark.host  # slow on a stand-in, and its parts are tested there
def test_a_life_is_lived_by_every_method() -> None:
    (life,) = language.compare(WORDS)
    assert {name: list(rows) for name, rows in life.later.items()} == {
        "plain": [0.0], "L2": list(WORDS.l2), "EWC": list(WORDS.ewc), "replay": list(WORDS.replay),
        "EWC, few": [WORDS.ewc[-1]], "EWC, own words": [WORDS.ewc[-1]], "LoRA": [0.0],
    }  # fmt: skip
    assert life.trained["LoRA"] < life.trained["plain"]
    assert set(life.alike) == {"few", "own words"}
    assert len(life.written["Python"]) == min(16, WORDS.context) + 240


# Workers


def test_work_is_done_wherever_it_is_done() -> None:
    for small in (True, False):
        with workers(small) as pool:
            assert [result() for result in [pool(divmod, 7, k) for k in (2, 3)]] == [(3, 1), (2, 1)]


def test_one_thread_is_put_back() -> None:
    threads = torch.get_num_threads()
    with one_thread(True):
        assert torch.get_num_threads() == 1
    with one_thread(False):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == threads
