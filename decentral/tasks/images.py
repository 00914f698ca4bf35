"""`FashionMNIST`: a small convolutional network on 28 x 28 pictures of clothes, read from idx files."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from decentral.errors import TaskError
from decentral.task import Task, to_device
from decentral.tasks import streams

CLASSES = 10
SIDE = 28
"""Pixels in a row and in a column."""

_IMAGES_MAGIC, _LABELS_MAGIC = 0x00000803, 0x00000801  # unsigned bytes in 3 dimensions, and in 1
_MEAN, _STD = 0.2860, 0.3530  # of the training pixels, scaled to 0 .. 1
_EVAL_CHUNK = 500


class FashionMNIST(Task):
    """Ten kinds of clothes (Xiao and others, 2017) and a network of 56 thousand parameters without batch statistics.

    A batch is (images [size, 1, 28, 28] float32, normalised; labels [size] int64), drawn with replacement.
    """

    name: ClassVar[str] = "fashion_mnist"
    headline: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True

    folder: Path = Path("/usr/share/datasets/fashion-mnist")
    """Where the four idx files lie, unpacked or with `.gz`; Debian's package dataset-fashion-mnist puts them there."""
    dirichlet_alpha: PositiveFloat | None = None
    """Skew of the labels: worker w draws its classes with weights ~ Dirichlet(alpha); None draws from all alike."""
    eval_samples: PositiveInt = 2000
    """Evenly spaced test pictures that `evaluate` looks at; never more than there are."""
    sample_seed: NonNegativeInt = 0
    """Chooses the pictures that are trained on, of the classes that `dirichlet_alpha` gives a worker."""

    def model(self) -> nn.Module:
        """Return a new model: [B, 1, 28, 28] float32 -> [B, 10] logits."""
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (SIDE // 4) ** 2, 32),
            nn.ReLU(),
            nn.Linear(32, CLASSES),
        )

    def batch(self, worker: int, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return (images, labels) of training pictures; raises `TaskError` if the files cannot be used."""
        pictures = _read_pictures(self.folder.absolute(), "train")
        if self.dirichlet_alpha is None:
            purpose = streams.seeded("images", self.sample_seed)
            chosen = streams.integers(purpose, worker, start, size, below=len(pictures.labels))
        else:
            chosen = _skewed(pictures, self.dirichlet_alpha, self.sample_seed, worker, start, size)
        return _tensors(pictures, chosen)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the mean cross-entropy, in nats."""
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` (nats) and `accuracy` (0 to 1) on the test set."""
        count, loss, right = 0, 0.0, 0
        for images, labels in self._heldout(model):
            logits = model(images)
            count += len(labels)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(dim=1) == labels).sum())
        return {"loss": loss / count, "accuracy": right / count}

    def predictions(self, model: nn.Module) -> Tensor:
        """Return log-probabilities for each picture that `evaluate` looks at, [pictures, 10] float32."""
        return torch.cat([model(images) for images, _ in self._heldout(model)]).log_softmax(dim=-1)

    def _heldout(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield test pictures and labels in chunks, where the model is."""
        pictures = _read_pictures(self.folder.absolute(), "t10k")
        count = min(self.eval_samples, len(pictures.labels))
        chosen = np.arange(count) * len(pictures.labels) // count
        device = next(model.parameters()).device
        for part in np.array_split(chosen, math.ceil(count / _EVAL_CHUNK)):
            yield to_device(_tensors(pictures, part), device)


class _Pictures(NamedTuple):
    """A labelled set, and the row numbers of each class in a row, for drawing from one class."""

    images: NDArray[np.uint8]
    """[n, 28, 28]"""
    labels: NDArray[np.uint8]
    """[n]"""
    by_class: NDArray[np.int64]
    """[n]: the rows of class 0, then those of class 1, ..."""
    counts: NDArray[np.int64]
    """[10]: pictures of each class."""


@lru_cache(maxsize=4)
def _read_pictures(folder: Path, part: str) -> _Pictures:
    images = _read_idx(folder, f"{part}-images-idx3-ubyte", _IMAGES_MAGIC)
    labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", _LABELS_MAGIC)
    if images.shape[1:] != (SIDE, SIDE):
        raise TaskError(f"fashion_mnist: {folder}: {part} images are {images.shape[1:]} pixels, expected (28, 28)")
    if len(images) != len(labels) or not len(labels):
        raise TaskError(
            f"fashion_mnist: {folder}: {len(images)} {part} images but {len(labels)} labels; "
            f"expected as many of each, and at least one"
        )
    if labels.max() >= CLASSES:
        raise TaskError(f"fashion_mnist: {folder}: a {part} label is {labels.max()}, expected 0 to {CLASSES - 1}")
    counts = np.bincount(labels, minlength=CLASSES).astype(np.int64)
    return _Pictures(images, labels, np.argsort(labels, kind="stable"), counts)


def _read_idx(folder: Path, name: str, magic: int) -> NDArray[np.uint8]:
    """Return the array of an idx file: big-endian magic number, one length for each dimension, the bytes."""
    path, data = _read_bytes(folder, name)
    dimensions = magic & 0xFF
    header_size = 4 + 4 * dimensions
    if len(data) < header_size:
        raise TaskError(f"fashion_mnist: {path} is torn: expected a header of {header_size} bytes, found {len(data)}")
    found_magic, *lengths = (int(number) for number in np.frombuffer(data, ">u4", count=1 + dimensions))
    if found_magic != magic:
        raise TaskError(
            f"fashion_mnist: {path} is no such idx file: expected magic number 0x{magic:08x}, found 0x{found_magic:08x}"
        )
    expected = header_size + math.prod(lengths)
    if len(data) != expected:
        raise TaskError(
            f"fashion_mnist: {path} is torn: expected {expected} bytes (unpacked) for dimensions "
            f"{tuple(lengths)}, found {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header_size).reshape(lengths)


def _read_bytes(folder: Path, name: str) -> tuple[Path, bytes]:
    """Return the unpacked content of `name` or `name.gz`, and which of them it came from."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            try:
                packed = path.read_bytes()
                return path, _unpack(packed) if path.suffix == ".gz" else packed
            except (OSError, zlib.error) as error:
                raise TaskError(f"fashion_mnist: cannot read {path}: {error}") from error
    raise TaskError(
        f"fashion_mnist: no {name} or {name}.gz in {folder}; expected there: train-images-idx3-ubyte, "
        f"train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, each plain or with .gz. "
        f"On Debian and Ubuntu the package dataset-fashion-mnist installs them in /usr/share/datasets/fashion-mnist"
    )


def _unpack(packed: bytes) -> bytes:
    # Not gzip.decompress: of a torn file this returns what is there, so that the error can say how much is missing.
    return zlib.decompressobj(wbits=31).decompress(packed)


def _skewed(pictures: _Pictures, alpha: float, seed: int, worker: int, start: int, size: int) -> NDArray[np.int64]:
    """Return [size] row numbers: first a class by the worker's weights, then any picture of that class."""
    present = np.flatnonzero(pictures.counts)
    shares = _class_weights(worker, alpha, len(present)).cumsum()
    draws = streams.uniforms(streams.seeded("image class", seed), worker, start, size)
    # The last share may round to less than 1.
    classes = present[np.searchsorted(shares, draws, side="right").clip(max=len(present) - 1)]
    firsts = pictures.counts.cumsum() - pictures.counts
    ranks = streams.hashes(streams.seeded("image in class", seed), worker, start, size)
    within = ranks % pictures.counts[classes].astype(np.uint64)
    chosen: NDArray[np.int64] = pictures.by_class[firsts[classes] + within.astype(np.int64)]
    return chosen


@lru_cache(maxsize=4096)
def _class_weights(worker: int, alpha: float, classes: int) -> NDArray[np.float64]:
    """Return [classes] float64, one draw from Dirichlet(alpha) that is the worker's own."""
    seed = streams.hashes("image class weights", worker, 0, 1)
    return np.random.default_rng(seed).dirichlet(np.full(classes, alpha))


def _tensors(pictures: _Pictures, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(pictures.images[chosen]).float().div(255).sub(_MEAN).div(_STD)
    return images.unsqueeze(1), torch.from_numpy(pictures.labels[chosen].astype(np.int64))
