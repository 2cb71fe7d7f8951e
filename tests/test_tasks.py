"""Sequences of tasks: the inputs change, the labels and the number of pixels do not."""

import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import nothing_changes
from torch import Tensor

from ewc_code.data import Examples, Images, load
from ewc_code.tasks import Task, limited, mnist_then_fashion, permuted, permuted_mnist, rotated
from ewc_experiments.comparison import together


@pytest.fixture(autouse=True)
def _sample_unless_full_data_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    if not os.environ.get("EWC_DATA"):
        monkeypatch.setenv("EWC_DATA", "sample")


def images(side: int = 5, n: int = 6) -> Images:
    """Every pixel of every image has a value of its own."""

    def part(start: int) -> Examples:
        x = (torch.arange(n * side * side, dtype=torch.float32) + start).view(n, -1) / 1e4
        return Examples(x, torch.arange(n) % 3)

    return Images("numbered", part(0), part(1000), part(2000))


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 999), side=st.integers(1, 6))
def test_permutations_are_bijective_and_the_same_for_all_images(count: int, seed: int, side: int) -> None:
    numbered = images(side)
    tasks = permuted(numbered, count, seed)
    assert len(tasks) == count
    assert torch.equal(tasks[0].train.x, numbered.train.x)
    for task in tasks:
        order = ((task.train.x[0] - numbered.train.x[0, 0]) * 1e4).round().long()  # where each pixel came from
        assert sorted(order.tolist()) == list(range(side * side))
        for seen, original in (
            (task.train, numbered.train),
            (task.validation, numbered.validation),
            (task.test, numbered.test),
        ):
            assert torch.equal(seen.x, original.x[:, order])
            assert torch.equal(seen.y, original.y)


def test_permutations_differ_between_tasks_and_seeds_and_come_again() -> None:
    numbered = images()
    first, again, other = (permuted(numbered, 3, seed)[1].train.x for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    _, second, third = permuted(numbered, 3)
    assert not torch.equal(second.train.x, third.train.x)
    assert torch.equal(permuted(numbered, 5)[2].train.x, third.train.x)  # more tasks leave the first ones alone


def right_permuted(whole: Images) -> tuple[Task, ...]:
    return permuted(whole, 3)


def wrong_14_padded_to_32(whole: Images) -> tuple[Task, ...]:
    def pad(part: Examples) -> Examples:
        square = torch.nn.functional.pad(part.x.view(-1, 28, 28), (2, 2, 2, 2))
        return Examples(square.flatten(1), part.y)

    return permuted(Images(whole.name, pad(whole.train), pad(whole.validation), pad(whole.test)), 3)


def assert_inputs_have_784_pixels(make: Callable[[Images], tuple[Task, ...]]) -> None:
    whole = limited(load("MNIST"), 50)
    for task in make(whole):
        assert task.train.x.shape == (50, 784), "inputs are not the 784 pixels of MNIST"
        torch.testing.assert_close(task.train.x.sum(1), whole.train.x.sum(1))


def test_inputs_have_784_pixels() -> None:
    assert_inputs_have_784_pixels(right_permuted)
    with pytest.raises(AssertionError, match="784"):
        assert_inputs_have_784_pixels(wrong_14_padded_to_32)


def rotate(x: Tensor, degrees: float) -> Tensor:
    whole = Images("one", *[Examples(x.reshape(len(x), -1), torch.zeros(len(x), dtype=torch.int64))] * 3)
    return rotated(whole, (degrees,))[0].train.x.view_as(x)


@pytest.mark.parametrize("turns", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("side", [4, 5])
def test_quarter_turns_are_exact_and_counter_clockwise(turns: int, side: int) -> None:
    x = images(side).train.x.view(-1, side, side)
    torch.testing.assert_close(rotate(x, 90.0 * turns), torch.rot90(x, turns, (1, 2)), rtol=0, atol=1e-6)


def test_small_turns_go_the_same_way() -> None:
    x = torch.zeros(1, 21, 21)
    x[0, 10, 18] = 1.0  # east of the centre
    turned = rotate(x, 30.0)[0]
    row, column = divmod(int(turned.argmax()), 21)
    assert row < 10 < column  # north east: y points down
    assert turned.min() >= 0
    assert turned.max() <= 1


def test_what_comes_from_outside_of_the_image_is_black() -> None:
    turned = rotate(torch.ones(1, 20, 20), 45.0)[0]
    assert turned[0, 0] == turned[-1, -1] == 0
    assert turned[10, 10] == pytest.approx(1)


def test_rotations_keep_labels_and_names() -> None:
    tasks = rotated(images(), (0.0, 22.5))
    assert [task.name for task in tasks] == ["0 degrees", "22.5 degrees"]
    assert torch.equal(tasks[1].test.y, images().test.y)
    torch.testing.assert_close(tasks[0].train.x, images().train.x)


def test_digits_then_clothes() -> None:
    first, second = mnist_then_fashion(100)
    assert (first.name, second.name) == ("MNIST", "Fashion-MNIST")
    assert len(first.train) == len(second.train) == 100
    assert len(first.test) == len(load("MNIST").test)
    assert torch.equal(second.validation.x, load("FashionMNIST").validation.x)


def test_limit_takes_the_first_training_examples_only() -> None:
    whole = images()
    assert torch.equal(limited(whole, None).train.x, whole.train.x)
    few = limited(whole, 2)
    assert torch.equal(few.train.x, whole.train.x[:2])
    assert few.validation is whole.validation
    assert few.test is whole.test
    assert len(limited(whole, 100).train) == len(whole.train)


def assert_images_stay_as_they_are(make: Callable[[Images], tuple[Task, ...]]) -> None:
    whole = limited(load("MNIST"), 100)
    before = whole.train.x.clone()
    with nothing_changes():
        for task in make(whole):
            task.train, task.validation, task.test  # noqa: B018 (properties do the work)
    assert torch.equal(whole.train.x, before), "the images were changed"
    whole.train.x.copy_(before)  # they may be everybody's


def wrong_18_permutes_in_place(whole: Images) -> tuple[Task, ...]:
    def mixed(x: Tensor) -> Tensor:
        return x.copy_(x.flip(1))

    return (Task("flipped", whole, mixed),)


def test_no_trace_is_left_and_the_images_stay_as_they_are() -> None:
    assert_images_stay_as_they_are(lambda whole: (*permuted(whole, 2), *rotated(whole, (10.0,))))
    assert_images_stay_as_they_are(lambda whole: mnist_then_fashion(10))
    one = Examples(torch.rand(3, 4), torch.zeros(3, dtype=torch.int64))
    own = Images("own", one, one, one)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(AssertionError, match="the images were changed"):
        patched.setitem(globals(), "load", lambda name: own)
        assert_images_stay_as_they_are(wrong_18_permutes_in_place)


@pytest.mark.parametrize("count", [0, -1])
def test_counts_below_one(count: int) -> None:
    for attempt in (lambda: permuted(images(), count), lambda: limited(images(), count)):
        with pytest.raises(ValueError, match=f"count must be at least 1; got {count}"):
            attempt()
    with pytest.raises(ValueError, match="at least 1; got 0"):
        rotated(images(), ())


def test_rotation_of_what_is_not_square() -> None:
    oblong = Examples(torch.ones(2, 12), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="square images, flattened; got 12 pixels"):
        rotated(Images("oblong", oblong, oblong, oblong), (10.0,))[0].train  # noqa: B018


def test_permuted_mnist_shares_one_copy_and_limits_what_is_held_out() -> None:
    first, second = permuted_mnist(2, 100, 50, seed=1), permuted_mnist(2, 100, 50, seed=2)
    assert first[0].images is second[1].images
    assert [len(part) for part in (first[0].train, first[0].validation, first[0].test)] == [100, 50, 50]
    assert not torch.equal(first[1].train.x, second[1].train.x)
    assert torch.equal(first[1].examples("train", 7).x, first[1].train.x[:7])
    some = torch.tensor([5, 3])
    assert torch.equal(first[1].examples("train", some).y, first[1].train.y[some])


def test_together_holds_every_example_of_every_task() -> None:
    tasks = permuted_mnist(3, 40, 20)
    (whole,) = together(partial(permuted_mnist, 3, 40, 20))
    assert torch.equal(whole.train.x, torch.cat([task.train.x for task in tasks]))
    assert len(whole.test) == 60


def test_what_is_held_out_is_a_random_part() -> None:
    """The published test images are not in random order: the first thousands are harder than the rest."""
    whole, some = load("MNIST").test, permuted_mnist(1, 100, 200)[0].test
    assert len(some) == 200
    assert not torch.equal(some.x, whole.x[:200])
    order = permuted_mnist(1, 100)[0].test
    assert torch.equal(order.y.bincount(minlength=10), whole.y.bincount(minlength=10))
