"""Make the embedded sample from the full data: first 500 training and 100 test images of each class, as published.

Usage: EWC_DATA=<root with MNIST/raw and FashionMNIST/raw> python tools/make_sample.py
"""

import io
import lzma

import numpy as np

from ewc_code import data

PER_CLASS = {"train": 500, "test": 100}


def first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` images of each of the ten classes, in the order of the full set."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)]))


def main() -> None:
    """Write `ewc_code/sample/NAME.npz.xz` for both data sets."""
    if data.source() != "full":
        raise SystemExit("the sample must be made from the full data; set EWC_DATA to it.")
    for name in data.CHECKSUMS:
        x, y, x_test, y_test = data._read_full(data.root(), name)
        train, test = first_of_each_class(y, PER_CLASS["train"]), first_of_each_class(y_test, PER_CLASS["test"])
        raw = io.BytesIO()
        # Uncompressed inside, because xz alone packs the images tighter than zip's deflate and then xz.
        np.savez(
            raw, x=x[train], y=y[train].astype(np.uint8), x_test=x_test[test], y_test=y_test[test].astype(np.uint8)
        )
        path = data.SAMPLE / f"{name}.npz.xz"
        path.write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))
        print(f"{path.relative_to(data.SAMPLE.parents[1])}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
