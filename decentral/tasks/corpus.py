"""`ByteText`: the bytes of a text, split into a training and a held-out part, for models that predict the next one."""

from __future__ import annotations

import math
import os
import sysconfig
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from decentral.errors import TaskError
from decentral.task import Task, to_device
from decentral.tasks import streams

VOCABULARY = 256
"""One token a byte value: no tokenizer to ship, to version or to disagree about."""

_EVAL_CHUNK = 32
"""Windows evaluated at once, so that memory does not grow with `eval_windows`."""

# Not the library's own code (tests, installed packages, the tools nobody imports) or tables written by a program,
# on which any model soon has nothing left to learn.
_STDLIB_SKIPPED = frozenset(
    {
        *("site-packages", "dist-packages", "ensurepip", "test", "tests", "idle_test", "idlelib", "lib2to3"),
        *("encodings", "pydoc_data"),
    }
)


class ByteText(Task):
    """A text of bytes and the loss of predicting each from those before it; who inherits it has the model.

    A batch is [size, context + 1] uint8: windows of the training text at hashed positions. The default corpus is the
    running Python's own standard library, so workers on different Python versions see different texts: give them a
    `corpus` if that matters.
    """

    headline: ClassVar[str] = "bits_per_byte"

    context: PositiveInt = 128
    """Bytes that the model sees at once."""
    corpus: Path | None = None
    """A folder, split by file, or one file, whose end is held out; None is Python's standard library."""
    suffixes: Annotated[tuple[str, ...], Field(min_length=1)] = (".txt", ".md", ".py")
    """Endings of the files to read when `corpus` is a folder; hidden folders and files are skipped."""
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Chance of a file to be held out of training; it depends on the file's path inside the corpus only."""
    eval_windows: PositiveInt = 64
    """Evenly spaced held-out windows that `evaluate` reads."""
    sample_seed: NonNegativeInt = 0
    """Chooses the windows that are trained on."""

    @property
    def tokens_per_sample(self) -> int:
        """The bytes that a window predicts."""
        return self.context

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Return what the model makes of bytes: [B, T] int64 -> [B, T, vocabulary] float32."""
        logits: Tensor = model(tokens)
        return logits

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        """Return [size, context + 1] uint8; raises `TaskError` if the corpus cannot be used."""
        text = self._corpus().train
        purpose = streams.seeded("text", self.sample_seed)
        places = streams.integers(purpose, worker, start, size, below=len(text) - self.context)
        return _windows(text, torch.from_numpy(places), self.context + 1)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean cross-entropy of the next byte, in nats."""
        tokens = batch.long()
        logits = self.logits(model, tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` (nats) and `bits_per_byte` over the same held-out windows every time."""
        total = sum(self.loss(model, chunk).item() * len(chunk) for chunk in self._heldout(model))
        loss = total / self.eval_windows
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def predictions(self, model: nn.Module) -> Tensor:
        """Return log-probabilities for each byte that `evaluate` predicts, [windows * context, vocabulary] float32."""
        logits = [self.logits(model, chunk[:, :-1].long()) for chunk in self._heldout(model)]
        return torch.cat(logits).flatten(0, 1).log_softmax(dim=-1)

    def _heldout(self, model: nn.Module) -> tuple[Tensor, ...]:
        """Return the held-out windows in chunks, each [at most 32, context + 1] uint8, where the model is."""
        text = self._corpus().heldout
        places = torch.linspace(0, len(text) - self.context - 1, self.eval_windows, dtype=torch.float64).long()
        windows: Tensor = to_device(_windows(text, places, self.context + 1), next(model.parameters()).device)
        return torch.split(windows, _EVAL_CHUNK)

    def _corpus(self) -> _Corpus:
        where = None if self.corpus is None else self.corpus.absolute()
        corpus = _read_corpus(where, self.suffixes, self.heldout_fraction)
        for name, text in corpus._asdict().items():
            if len(text) <= self.context:
                raise TaskError(
                    f"task.corpus: the {name} part of {_name(where)} has {len(text)} bytes, but a window needs "
                    f"context + 1 = {self.context + 1}; use more text, a smaller context or another heldout_fraction "
                    f"(a folder is split by file: put a handful of files into one file to split it by bytes)"
                )
        return corpus


class _Corpus(NamedTuple):
    """The two parts of a text, each [bytes] uint8."""

    train: Tensor
    heldout: Tensor


def is_heldout(relative_path: str, fraction: float) -> bool:
    """Say on which side of the split a file lies, by its `/`-separated path inside the corpus and nothing else."""
    return zlib.crc32(relative_path.encode()) < fraction * 2**32


@lru_cache(maxsize=4)
def _read_corpus(where: Path | None, suffixes: tuple[str, ...], heldout_fraction: float) -> _Corpus:
    try:
        if where is not None and where.is_file():
            return _split_file(where, heldout_fraction)
        return _split_folder(where, suffixes, heldout_fraction)
    except OSError as error:
        raise TaskError(f"task.corpus: cannot read {_name(where)}: {error}") from error


def _split_file(path: Path, heldout_fraction: float) -> _Corpus:
    text = path.read_bytes()
    cut = round(len(text) * (1 - heldout_fraction))
    return _Corpus(_tensor(text[:cut]), _tensor(text[cut:]))


def _split_folder(where: Path | None, suffixes: tuple[str, ...], heldout_fraction: float) -> _Corpus:
    folder = Path(sysconfig.get_path("stdlib")) if where is None else where
    if not folder.is_dir():
        raise TaskError(f"task.corpus: {folder} does not exist; it must be a folder or a file")
    endings, skipped = (suffixes, frozenset[str]()) if where is not None else ((".py",), _STDLIB_SKIPPED)
    paths = sorted(_files(folder, endings, skipped))
    if not paths:
        raise TaskError(f"task.corpus: no file in {folder} ends in {', '.join(endings)}; name others with `suffixes`")
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for path in paths:
        sides[is_heldout(path, heldout_fraction)].append((folder / path).read_bytes())
    return _Corpus(*(_tensor(b"".join(side)) for side in sides))


def _files(folder: Path, endings: tuple[str, ...], skipped: frozenset[str]) -> Iterator[str]:
    """Yield the `/`-separated paths, relative to the folder, of the files that count as text."""
    for root, folders, names in os.walk(folder):
        # Pruned in place: a site-packages folder may hold a hundred thousand files.
        folders[:] = [name for name in folders if name not in skipped and not name.startswith((".", "__pycache__"))]
        for name in names:
            if name.endswith(endings) and not name.startswith("."):
                yield Path(root, name).relative_to(folder).as_posix()


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def _windows(text: Tensor, places: Tensor, length: int) -> Tensor:
    """Return [places, length] uint8: the bytes of the text from each place on."""
    return text[places[:, None] + torch.arange(length)]


def _name(where: Path | None) -> str:
    return "Python's standard library" if where is None else f"corpus {where}"
