"""Images as tensors on a device: MNIST and Fashion-MNIST, whole or as the embedded sample, never altered unnoticed."""

import errno
import hashlib
import io
import lzma
import os
import shutil
import socket
import warnings
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from types import ModuleType

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from jaxtyping import Float, Int64
from torch import Tensor

from ewc_code.environment import device, generator

# SHA-256 of the unpacked files, as torchvision lays them out under the root.
CHECKSUMS = {
    "MNIST": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}
SAMPLE = Path(__file__).parent / "sample"
VALIDATION_SHARE = 6  # one training image in six is held out to choose settings, the rest is trained on
TIMEOUT_S = 20.0
_SCHEMAS: list[torch.library.Library] = []  # schemas that `torchvision_datasets` declares live as long as this does
# What a folder or a disk answers; any other OSError while downloading is the network's.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOENT,
               errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EIO, errno.EFBIG)  # fmt: skip


@dataclass(frozen=True)
class Examples:
    """Examples of one task, on one device: inputs x, (n, ...), where pixels lie in 0..1, and their labels y.

    Labels are (n,), 0..classes-1, or (n, t), one at each of t positions of a sequence; the targets of a regression are
    (n, k), floating point.
    """

    x: Tensor
    y: Int64[Tensor, " n"] | Int64[Tensor, "n t"] | Float[Tensor, "n k"]

    def __post_init__(self) -> None:
        targets = self.y.is_floating_point() and self.y.ndim == 2
        sequences = self.y.ndim == 2 and self.y.shape[1] > 1  # a single column is a label an example, put wrongly
        if not targets and (self.y.dtype != torch.int64 or not (self.y.ndim == 1 or sequences)):
            raise ValueError(
                "labels must be int64 of shape (n,) or (n, t), t > 1, or targets floating point of shape (n, k); "
                f"got {self.y.dtype}, {tuple(self.y.shape)}."
            )
        if len(self.x) != len(self.y):
            raise ValueError(f"there must be one label per input; got {len(self.x)} inputs, {len(self.y)} labels.")
        if len(self.y) == 0:
            raise ValueError("there must be at least one example; got none. Check the filter or split that made it.")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def count(self) -> int:
        """The N of every formula; it counts examples, or positions where each position of a sequence has a label."""
        return len(self.y) if self.y.is_floating_point() else self.y.numel()

    def __getitem__(self, index: slice | Tensor) -> "Examples":
        return Examples(self.x[index], self.y[index])


@dataclass(frozen=True)
class Images:
    """One image data set in three parts: to fit on, to choose settings on, to report on."""

    name: str
    train: Examples
    validation: Examples
    test: Examples


@lru_cache(maxsize=4)
def _source(setting: str) -> str:
    if setting == "sample":
        return "sample"
    folder = root()
    wrong = {name: found for name in CHECKSUMS if (found := _wrong(folder, name))}
    damaged = [said for name in wrong for file, said in wrong[name].items() if (folder / name / "raw" / file).exists()]
    if damaged and setting:
        raise ValueError(
            f"{damaged[0]}, and left as it is in the folder of EWC_DATA: put the published file there, or unset "
            "EWC_DATA and the book fetches a copy of its own, or set it to 'sample' for the embedded sample."
        )
    try:
        for name in wrong:
            _download(folder, name)
    except ConnectionError as error:
        warnings.warn(
            f"{' and '.join(wrong)} are not in {folder}, or not whole, and could not be downloaded ({error}). The "
            f"embedded sample of 500 training and 100 test images a class is used instead; numbers will differ from "
            f"the full data's. Set EWC_DATA to a folder in torchvision's layout, or try again with a network.",
            stacklevel=3,
        )
        return "sample"
    for said in damaged:
        warnings.warn(f"{said}. It was fetched again.", stacklevel=3)
    return "full"


def source() -> str:
    """Which data this process uses: 'full' or 'sample' (embedded). Downloads the full data when it is absent.

    `EWC_DATA` names the root in torchvision's layout, or is the word `sample`; without it a user cache folder is used.
    Decided once a process, so that no two results of one run come from different data. A file that is not as published
    is fetched again where the folder is the user cache; in a folder that EWC_DATA names it is left, and a ValueError.
    """
    return _source(os.environ.get("EWC_DATA", ""))


def root() -> Path:
    """Folder that holds (or will hold) `MNIST/raw` and `FashionMNIST/raw`."""
    return Path(os.environ.get("EWC_DATA") or platformdirs.user_cache_path("ewc_code", appauthor=False) / "data")


def load(name: str, on: torch.device | None = None) -> Images:
    """'MNIST' or 'FashionMNIST' as tensors: pixels in 0..1, flattened to 784, on a device (`environment.device`).

    The validation part is a sixth of the training images, drawn once with a fixed seed; it is never trained on.
    Full data: 50,000 / 10,000 / 10,000 examples; sample: 4,167 / 833 / 1,000. Another name, or
    a damaged file in a folder of EWC_DATA's, is a ValueError; a full disk or a read-only folder an OSError.
    """
    if name not in CHECKSUMS:
        raise ValueError(f"data set must be one of {list(CHECKSUMS)}; got {name!r}.")
    arrays = _read_full(root(), name) if source() == "full" else read_sample(name)
    x, y, x_test, y_test = (torch.from_numpy(a).to(on or device()) for a in arrays)
    order = torch.randperm(len(y), generator=generator(0)).to(y.device)
    held_out = len(y) // VALIDATION_SHARE
    train, validation = (_examples(x[part], y[part]) for part in (order[held_out:], order[:held_out]))
    return Images(name, train, validation, test=_examples(x_test, y_test))


def read_sample(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The embedded sample, as bytes: images (5000, 28, 28), labels (5000,), then 1,000 of each for testing.

    The first 500 training and 100 test images of each class, in the order of the full set (`tools/make_sample.py`).
    A packed file that is truncated or altered is a ValueError (xz carries a checksum of its content).
    """
    path = SAMPLE / f"{name}.npz.xz"
    try:
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as arrays:
            return arrays["x"], arrays["y"], arrays["x_test"], arrays["y_test"]
    except (lzma.LZMAError, EOFError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} must be the sample that the package ships; got: {error}. It is missing, truncated or altered: "
            "install ewc-code again."
        ) from error


def _examples(images: Tensor, labels: Tensor) -> Examples:
    return Examples(images.reshape(len(images), -1).float() / 255, labels.long())


def _read_full(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The verified files themselves: torchvision's classes prefer a `processed` folder, which nobody has verified."""
    raw, mnist = folder / name / "raw", torchvision_datasets().mnist
    x, x_test = (mnist.read_image_file(str(raw / f"{part}-images-idx3-ubyte")).numpy() for part in ("train", "t10k"))
    y, y_test = (mnist.read_label_file(str(raw / f"{part}-labels-idx1-ubyte")).numpy() for part in ("train", "t10k"))
    return x, y, x_test, y_test


def _wrong(folder: Path, name: str) -> dict[str, str]:
    """The files of a data set that are not there or not as published, and what to say of each."""
    said = {}
    for file, expected in CHECKSUMS[name].items():
        path = folder / name / "raw" / file
        try:
            content = path.read_bytes()
            found = f"{hashlib.sha256(content).hexdigest()} ({len(content)} bytes)"
        except OSError as error:
            found = str(error.strerror)
        if not found.startswith(expected):
            said[file] = f"{path} must have the published content, SHA-256 {expected}; got {found}. It is damaged"
    return said


def _download(folder: Path, name: str) -> None:
    """Fetch, verify in a folder of its own, then move file by file: what lies in `folder` is always whole.

    One process at a time: what lies in that folder of its own then was left by one that was killed, and goes.
    ConnectionError: no server was reached, or it sent other data; OSError: the disk is full or the folder read-only.
    """
    timeout, partial = socket.getdefaulttimeout(), folder / ".ewc_code-download"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".ewc_code-lock", timeout=30 * TIMEOUT_S):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                if wrong := _wrong(folder, name):  # else another process fetched it while this one waited
                    socket.setdefaulttimeout(TIMEOUT_S)
                    getattr(torchvision_datasets(), name)(partial, train=True, download=True)
                    if bad := _wrong(partial, name):
                        raise ValueError(next(iter(bad.values())))
                    (folder / name / "raw").mkdir(parents=True, exist_ok=True)
                    for file in wrong:
                        os.replace(partial / name / "raw" / file, folder / name / "raw" / file)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, RuntimeError, ValueError, EOFError, HTTPException) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise OSError(
                error.errno,
                f"{folder} must be writable with 200 MB free to hold {name}; got: {error.strerror}. "
                "Free some space, or set EWC_DATA to another folder, or to 'sample' for the embedded sample",
            ) from error
        raise ConnectionError(str(error)) from error
    finally:
        socket.setdefaulttimeout(timeout)


@lru_cache(maxsize=1)
def torchvision_datasets() -> ModuleType:
    """`torchvision.datasets`, also beside a torch that torchvision's compiled operators do not fit.

    torchvision's Linux wheels are built for CUDA. Beside a CPU-only torch the operators do not load, and the import
    stops because the schemas of two of them are unknown. The data sets need none of them, so declaring the schemas is
    enough; calling the operators still fails loudly. Only done when the plain import fails.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _SCHEMAS.append(torch.library.Library("torchvision", "FRAGMENT"))
        for name in ("nms", "qnms"):
            _SCHEMAS[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        from torchvision import datasets
    return datasets
