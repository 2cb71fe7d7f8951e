"""The data: as published or refused, nothing half-written, and the sample when there is no network."""

import errno
import hashlib
import http.client
import os
import shutil
import socket
import struct
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracles import nothing_changes, types_unchecked

from ewc_code import data
from ewc_code.data import Examples
from ewc_code.environment import device

NAMES = ("MNIST", "FashionMNIST")
FULL = os.environ.get("EWC_DATA", "sample") != "sample"
LOCK = ".ewc_code-lock"


@pytest.fixture(autouse=True)
def _fresh_decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test decides anew which data there is; the sample unless full data is given."""
    if not FULL:
        monkeypatch.setenv("EWC_DATA", "sample")
    data._source.cache_clear()
    yield
    data._source.cache_clear()


def tree(folder: Path) -> list[str]:
    """What lies in a folder, but for the lock of downloads, which is empty and stays."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != LOCK)


# What everyone gets.


@pytest.mark.parametrize("name", NAMES)
def test_images_are_tensors_on_the_device(name: str) -> None:
    with nothing_changes():
        images = data.load(name)
    sizes = {"full": (50_000, 10_000, 10_000), "sample": (4_167, 833, 1_000)}[data.source()]
    for part, size in zip((images.train, images.validation, images.test), sizes, strict=True):
        assert part.x.shape == (size, 784)  # pitfall 14: 1,024 after padding
        assert part.x.dtype == torch.float32
        assert part.x.device.type == part.y.device.type == device().type
        assert part.y.dtype == torch.int64
        assert 0 <= part.x.min() < part.x.max() <= 1
        assert part.y.unique().tolist() == list(range(10))
    assert images.train.x.max() == 1
    assert images.name == name


def test_same_split_every_time() -> None:
    first, again = data.load("MNIST"), data.load("MNIST")
    assert torch.equal(first.train.x, again.train.x)
    assert torch.equal(first.validation.y, again.validation.y)


def test_parts_together_are_the_data_set_and_share_no_image() -> None:
    images = data.load("MNIST")
    together = torch.cat([images.train.y, images.validation.y])
    raw = data.read_sample("MNIST")[1] if data.source() == "sample" else data._read_full(data.root(), "MNIST")[1]
    assert torch.equal(together.bincount().cpu(), torch.from_numpy(raw.astype(np.int64)).bincount())
    rows = {row.tobytes() for row in images.train.x[:4000].cpu().numpy()}
    assert sum(row.tobytes() in rows for row in images.validation.x[:800].cpu().numpy()) <= 1  # MNIST repeats none


def test_validation_is_not_test() -> None:
    """Pitfall 13."""
    images = data.load("MNIST")
    rows = {row.tobytes() for row in images.test.x.cpu().numpy()}
    assert not any(row.tobytes() in rows for row in images.validation.x[:800].cpu().numpy())


def test_classes_are_mixed_in_the_order_of_the_examples() -> None:
    first = data.load("MNIST").train.y[:500].bincount(minlength=10)
    assert first.min() > 20


@pytest.mark.parametrize("name", NAMES)
def test_sample_has_500_and_100_images_of_each_class(name: str) -> None:
    x, y, x_test, y_test = data.read_sample(name)
    assert x.shape == (5000, 28, 28)
    assert x_test.shape == (1000, 28, 28)
    assert np.bincount(y).tolist() == [500] * 10
    assert np.bincount(y_test).tolist() == [100] * 10
    assert x.dtype == np.uint8


@pytest.mark.skipif(not FULL, reason="needs EWC_DATA to name the full data")
@pytest.mark.parametrize("name", NAMES)
def test_sample_is_the_first_of_each_class_of_the_full_data(name: str) -> None:
    full, sample = data._read_full(data.root(), name), data.read_sample(name)
    for images, labels, count in ((0, 1, 500), (2, 3, 100)):
        index = np.sort(np.concatenate([np.flatnonzero(full[labels] == c)[:count] for c in range(10)]))
        assert np.array_equal(full[images][index], sample[images])
        assert np.array_equal(full[labels][index], sample[labels])


def test_sample_travels_in_the_package_and_is_small() -> None:
    assert sum((data.SAMPLE / f"{name}.npz.xz").stat().st_size for name in NAMES) < 6e6


# Examples.


def test_examples_refuse_what_does_not_fit() -> None:
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for bad, match in (
        (lambda: Examples(x, y.int()), r"labels must be int64 of shape \(n,\) or \(n, t\).*got torch.int32, \(3,\)"),
        (lambda: Examples(x, y[:, None]), r"got torch.int64, \(3, 1\)"),
        (lambda: Examples(x, y[:2]), "one label per input; got 3 inputs, 2 labels"),
        (lambda: Examples(x[:0], y[:0]), "at least one example; got none. Check the filter or split"),
    ):
        with types_unchecked(), pytest.raises(ValueError, match=match):
            bad()


def test_examples_can_be_sliced_and_indexed() -> None:
    part = Examples(torch.arange(6.0).view(3, 2), torch.arange(3))
    assert len(part[1:]) == 2
    assert part[torch.tensor([2, 0])].y.tolist() == [2, 0]


# A root with a tiny published data set, and what can go wrong with it.


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def publish(folder: Path, name: str) -> None:
    draw = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        write_idx(folder / name / "raw" / f"{part}-images-idx3-ubyte", draw.integers(0, 256, (count, 28, 28)))
        write_idx(folder / name / "raw" / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both data sets in torchvision's layout, and their checksums taken for the published ones."""
    server = tmp_path / "server"
    sums = {}
    for name in NAMES:
        publish(server, name)
        files = sorted((server / name / "raw").iterdir())
        sums[name] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    monkeypatch.setattr(data, "CHECKSUMS", sums)
    return server


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "root"
    monkeypatch.setenv("EWC_DATA", str(folder))
    return folder


def test_full_data_is_read_where_it_is(published: Path, root: Path) -> None:
    shutil.copytree(published, root)
    assert data.source() == "full"
    images = data.load("FashionMNIST")
    assert [len(part) for part in (images.train, images.validation, images.test)] == [50, 10, 20]


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "longer"])
@pytest.mark.parametrize("part", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_that_is_not_what_was_published(published: Path, root: Path, part: str, damage: str) -> None:
    shutil.copytree(published, root)
    path = root / "MNIST" / "raw" / part
    whole = path.read_bytes()
    altered = bytearray(whole)
    altered[-3] ^= 1
    path.write_bytes({"truncated": whole[:-5], "altered": bytes(altered), "empty": b"", "longer": whole + b"x"}[damage])
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{part} must have the published content.*got .*bytes.*unset EWC_DATA"):
        data.load("MNIST")
    assert path.read_bytes() == damaged  # somebody else's folder
    path.write_bytes(whole)
    data.load("MNIST")  # repaired, in the same process


def test_processed_files_of_an_old_torchvision_are_not_read_instead(published: Path, root: Path) -> None:
    shutil.copytree(published, root)
    for name in ("training.pt", "test.pt"):
        path = root / "MNIST" / "processed" / name
        path.parent.mkdir(exist_ok=True)
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)), path)
    assert len(data.load("MNIST").train) == 50
    assert (root / "MNIST" / "processed" / "training.pt").exists()


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setenv("EWC_DATA", "sample")
    packed = bytearray((data.SAMPLE / "MNIST.npz.xz").read_bytes())
    packed[len(packed) // 2] ^= 1
    if damage != "missing":
        (tmp_path / "MNIST.npz.xz").write_bytes(packed if damage == "altered" else packed[:1000])
    monkeypatch.setattr(data, "SAMPLE", tmp_path)
    with pytest.raises(ValueError, match=r"must be the sample that the package ships.*install ewc-code again"):
        data.load("MNIST")


def test_unknown_data_set() -> None:
    with pytest.raises(ValueError, match=r"one of \['MNIST', 'FashionMNIST'\]; got 'CIFAR10'"):
        data.load("CIFAR10")


# Downloads. The server is a folder; `fail` happens after the files named in `before` were written.


def downloads(
    monkeypatch: pytest.MonkeyPatch, server: Path, fail: Callable[[Path], None] = lambda folder: None
) -> list[str]:
    """Replaces torchvision's classes: reading stays, downloading copies from the folder, then fails as told."""
    real, asked = data.torchvision_datasets(), []

    def kind(name: str) -> Callable[..., object]:
        def make(folder: Path, train: bool, download: bool = False) -> object:
            if download:
                asked.append(name)
                shutil.copytree(server / name, folder / name)
                fail(folder / name / "raw")
            return getattr(real, name)(folder, train=train)

        return make

    made = {"mnist": real.mnist} | {name: kind(name) for name in NAMES}
    monkeypatch.setattr(data, "torchvision_datasets", lambda: SimpleNamespace(**made))
    return asked


def raising(error: BaseException) -> Callable[[Path], None]:
    def fail(folder: Path) -> None:
        next(folder.iterdir()).write_bytes(b"half of it")
        raise error

    return fail


def test_absent_data_is_downloaded_once_and_nothing_else_is_left(
    published: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = downloads(monkeypatch, published)
    assert data.source() == "full"
    assert tree(root) == tree(published)
    assert [path.name for path in root.iterdir() if path.name.startswith(".")] == [LOCK]
    data._source.cache_clear()
    assert data.source() == "full"
    assert asked == list(NAMES)


def test_only_the_missing_data_set_is_downloaded(published: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(published / "MNIST", root / "MNIST")
    asked = downloads(monkeypatch, published)
    assert data.source() == "full"
    assert asked == ["FashionMNIST"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
def test_full_disk_and_unwritable_folder(
    published: Path, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    downloads(monkeypatch, published, raising(OSError(number, os.strerror(number))))
    with pytest.raises(OSError, match=r"must be writable with 200 MB free.*got: .*Free some space, or set") as e:
        data.load("MNIST")
    assert e.value.errno == number
    assert str(root) in str(e.value)
    assert os.strerror(number) in str(e.value)
    assert [path.name for path in root.iterdir()] == [LOCK]


def test_disk_that_fills_up_while_files_are_moved(published: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, published)
    real, moves = os.replace, []

    def replace(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(data.os, "replace", replace)
    with pytest.raises(OSError, match="must be writable"):
        data.load("MNIST")
    # Two whole files lie there, and the set counts as absent until the others do.
    assert all(file in data.CHECKSUMS["MNIST"] for file in os.listdir(root / "MNIST" / "raw"))
    assert len(data._wrong(root, "MNIST")) == 2
    monkeypatch.setattr(data.os, "replace", real)
    assert data.source() == "full"
    assert tree(root) == tree(published)


def test_a_root_that_is_a_file(published: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, published)
    root.write_text("not a folder")
    with pytest.raises(OSError, match=f"{root} must be writable"):
        data.load("MNIST")
    assert root.read_text() == "not a folder"


def test_a_root_below_what_cannot_be_written(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, published)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setenv("EWC_DATA", "/nowhere/data")
    with pytest.raises(OSError, match=r"/nowhere/data must be writable.*Permission denied"):
        data.load("MNIST")


UNREACHABLE = {
    "name not found": urllib.error.URLError("Name or service not known"),
    "connection broken off": ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    "too slow": TimeoutError("timed out"),
    "cut short": http.client.IncompleteRead(b"12"),
    "all mirrors tried": RuntimeError("Error downloading train-images"),
    "archive cut short": EOFError("Compressed file ended before the end-of-stream marker was reached"),
}


@pytest.mark.parametrize("error", UNREACHABLE.values(), ids=UNREACHABLE)
def test_no_network_means_the_sample_with_a_warning(
    published: Path, root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    downloads(monkeypatch, published, raising(error))
    said = r"MNIST and FashionMNIST are not in .*, or not whole.*embedded sample.*Set EWC_DATA"
    with pytest.warns(UserWarning, match=said) as seen:
        assert data.source() == "sample"
    assert str(root) in str(seen[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.source() == "sample"  # decided once, said once
    assert [path.name for path in root.iterdir()] == [LOCK]


def test_torchvision_itself_without_a_network(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.warns(UserWarning, match="no network in this test"):
        images = data.load("MNIST")
    assert len(images.train) == 4167
    assert [path.name for path in root.iterdir()] == [LOCK]


def test_a_server_that_sends_something_else(published: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tamper(folder: Path) -> None:
        path = folder / "train-labels-idx1-ubyte"
        path.write_bytes(path.read_bytes()[:-1] + b"\x03")

    downloads(monkeypatch, published, tamper)
    with pytest.warns(UserWarning, match=r"could not be downloaded .*must have the published content"):
        assert data.source() == "sample"
    assert [path.name for path in root.iterdir()] == [LOCK]


def test_interrupted_download_leaves_nothing(published: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    downloads(monkeypatch, published, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        data.source()
    assert [path.name for path in root.iterdir()] == [LOCK]


def test_timeouts_of_the_process_are_put_back(published: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    downloads(monkeypatch, published, lambda folder: seen.append(socket.getdefaulttimeout()))
    before = socket.getdefaulttimeout()
    data.source()
    assert seen == [data.TIMEOUT_S] * 2
    assert socket.getdefaulttimeout() == before


def test_default_root_is_a_user_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EWC_DATA", raising=False)
    assert data.root().name == "data"
    assert data.root().parent.name == "ewc_code"
    assert data.root().is_absolute()
