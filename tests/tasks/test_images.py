"""FashionMNIST: reading idx files, streams of pictures, and skewed labels."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from decentral.errors import TaskError
from decentral.tasks import FashionMNIST

TRAIN, TEST = 600, 50


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    header = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape)
    return header + array.tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small idx files: picture i has label i % 10, and every pixel is 20 x its label."""
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.broadcast_to((20 * labels)[:, None, None], (count, 28, 28)).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def replace(folder: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)


def read(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def test_pictures_keep_their_labels_and_are_normalised(folder: Path) -> None:
    images, labels = FashionMNIST(folder=folder).batch(0, 0, 100)
    assert images.shape == (100, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    expected = (20 * labels / 255 - 0.2860) / 0.3530
    assert torch.allclose(images, expected[:, None, None, None].expand_as(images), atol=1e-6)
    assert set(labels.tolist()) == set(range(10))


def test_packed_and_plain_files_give_the_same_batches(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    packed = tmp_path_factory.mktemp("packed")
    for path in folder.iterdir():
        (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    batches = [FashionMNIST(folder=where).batch(1, 5, 9) for where in (folder, packed)]
    for plain, unpacked in zip(*batches, strict=True):
        assert torch.equal(plain, unpacked)


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_samples_do_not_depend_on_how_they_are_cut_into_batches(folder: Path, alpha: float | None) -> None:
    task = FashionMNIST(folder=folder, dirichlet_alpha=alpha)
    whole = task.batch(2, 0, 8)
    parts = zip(task.batch(2, 0, 3), task.batch(2, 3, 5), strict=True)
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(whole, parts, strict=True))


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_workers_differ(folder: Path, alpha: float | None) -> None:
    task = FashionMNIST(folder=folder, dirichlet_alpha=alpha)
    assert not torch.equal(task.batch(0, 0, 64)[1], task.batch(1, 0, 64)[1])


@pytest.mark.parametrize("alpha", [None, 0.5])
def test_a_sample_seed_draws_other_pictures_with_the_same_weights(folder: Path, alpha: float | None) -> None:
    usual, other = (FashionMNIST(folder=folder, dirichlet_alpha=alpha, sample_seed=seed) for seed in (0, 1))
    (images, _), (others, _) = usual.batch(0, 0, 64), other.batch(0, 0, 64)
    assert not images.equal(others)
    assert torch.allclose(shares(usual, 0), shares(other, 0), atol=5 * 0.5 / 4000**0.5)


def test_predictions_are_those_that_evaluation_judges(folder: Path) -> None:
    task = FashionMNIST(folder=folder)
    torch.manual_seed(0)
    model = task.model()
    with torch.no_grad():
        found, metrics = task.predictions(model), task.evaluate(model)
    labels = torch.from_numpy(np.frombuffer(read(folder, "t10k-labels-idx1-ubyte"), np.uint8, offset=8).astype("int64"))
    assert torch.nn.functional.nll_loss(found, labels).item() == pytest.approx(metrics["loss"], rel=1e-5)
    assert (found.argmax(1) == labels).float().mean().item() == pytest.approx(metrics["accuracy"])


def shares(task: FashionMNIST, worker: int, draws: int = 4000) -> torch.Tensor:
    labels = task.batch(worker, 0, draws)[1]
    return torch.bincount(labels, minlength=10) / len(labels)


def test_without_alpha_every_class_is_as_likely(folder: Path) -> None:
    assert shares(FashionMNIST(folder=folder), 0).sub(0.1).abs().max() < 0.02


def test_a_small_alpha_skews_and_a_large_one_does_not(folder: Path) -> None:
    skewed, even = FashionMNIST(folder=folder, dirichlet_alpha=0.1), FashionMNIST(folder=folder, dirichlet_alpha=1e4)
    assert np.mean([shares(skewed, worker).max() for worker in range(10)]) > 0.5
    assert shares(even, 0).sub(0.1).abs().max() < 0.02


def test_dirichlet_weights_have_the_variance_of_the_distribution(folder: Path) -> None:
    task = FashionMNIST(folder=folder, dirichlet_alpha=1.0)
    drawn = torch.stack([shares(task, worker, draws=1000) for worker in range(100)])
    assert drawn.mean(dim=0).sub(0.1).abs().max() < 0.03
    # Dirichlet(1, ..., 1) over 10 classes: 0.1 * 0.9 / 11.
    assert drawn.var(dim=0).mean() == pytest.approx(0.1 * 0.9 / 11, rel=0.15)


def test_skewed_draws_take_every_picture_of_a_class(folder: Path) -> None:
    labels = (np.arange(TRAIN) % 10).astype(np.uint8)
    marked = np.repeat(np.arange(TRAIN) // 10, 28 * 28).reshape(TRAIN, 28, 28).astype(np.uint8)
    replace(folder, "train-images-idx3-ubyte", idx(marked))
    replace(folder, "train-labels-idx1-ubyte", idx(labels))
    images, drawn = FashionMNIST(folder=folder, dirichlet_alpha=100.0).batch(0, 0, 8000)
    pictures = torch.stack((drawn.float(), images[:, 0, 0, 0]), dim=1)
    assert len(torch.unique(pictures, dim=0)) == TRAIN


def test_classes_without_pictures_are_never_drawn(folder: Path) -> None:
    replace(folder, "train-labels-idx1-ubyte", idx((np.arange(TRAIN) % 3 * 2).astype(np.uint8)))
    labels = FashionMNIST(folder=folder, dirichlet_alpha=5.0).batch(0, 0, 500)[1]
    assert set(labels.tolist()) == {0, 2, 4}


def test_evaluation_counts_right_answers_on_the_test_set(folder: Path) -> None:
    class Threes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = torch.nn.Parameter(torch.eye(10)[3] * 100)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.bias.expand(len(images), 10)

    with torch.no_grad():
        answer = FashionMNIST(folder=folder).evaluate(Threes())
    assert answer == {"loss": pytest.approx(90.0), "accuracy": pytest.approx(0.1)}
    assert FashionMNIST.headline == "accuracy"
    assert FashionMNIST.higher_is_better


def test_the_real_files_can_be_learned_from() -> None:
    task = FashionMNIST(eval_samples=500)
    torch.manual_seed(0)
    model = task.model()
    assert 30_000 < sum(parameter.numel() for parameter in model.parameters()) < 100_000
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(100):
        optimizer.zero_grad()
        task.loss(model, task.batch(0, 32 * step, 32)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        assert task.evaluate(model)["accuracy"] > 0.6


def test_missing_files_name_the_folder_the_files_and_the_package(tmp_path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        FashionMNIST(folder=tmp_path / "nowhere").batch(0, 0, 1)
    message = str(caught.value)
    assert f"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {tmp_path / 'nowhere'}" in message
    assert "t10k-labels-idx1-ubyte" in message
    assert "dataset-fashion-mnist" in message


def test_a_torn_file_names_expected_and_found_bytes(folder: Path) -> None:
    name = "train-images-idx3-ubyte"
    size = 16 + TRAIN * 28 * 28
    replace(folder, name, read(folder, name)[:-100])
    with pytest.raises(TaskError, match=rf"{name} is torn: expected {size} bytes .*, found {size - 100}"):
        FashionMNIST(folder=folder).batch(0, 0, 1)


def test_a_torn_gz_names_expected_and_found_bytes(folder: Path) -> None:
    name = "t10k-images-idx3-ubyte"
    noise = np.random.default_rng(0).integers(0, 256, (TEST, 28, 28)).astype(np.uint8)
    (folder / name).unlink()
    replace(folder, f"{name}.gz", gzip.compress(idx(noise))[:20_000])
    size = 16 + TEST * 28 * 28
    with pytest.raises(TaskError, match=rf"{name}\.gz is torn: expected {size} bytes .*, found [12]\d{{4}}$"):
        FashionMNIST(folder=folder).evaluate(torch.nn.Linear(1, 1))


def test_a_file_too_short_for_its_header_is_refused(folder: Path) -> None:
    replace(folder, "train-labels-idx1-ubyte", b"\0\0\x08")
    with pytest.raises(TaskError, match="labels-idx1-ubyte is torn: expected a header of 8 bytes, found 3"):
        FashionMNIST(folder=folder).batch(0, 0, 1)


def test_a_wrong_magic_number_is_refused(folder: Path) -> None:
    replace(folder, "train-images-idx3-ubyte", read(folder, "train-labels-idx1-ubyte"))
    with pytest.raises(TaskError, match="expected magic number 0x00000803, found 0x00000801"):
        FashionMNIST(folder=folder).batch(0, 0, 1)


def test_a_file_that_is_not_gzip_is_refused(folder: Path) -> None:
    (folder / "train-images-idx3-ubyte").rename(folder / "train-images-idx3-ubyte.gz")
    with pytest.raises(TaskError, match=r"cannot read .*train-images-idx3-ubyte\.gz"):
        FashionMNIST(folder=folder).batch(0, 0, 1)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-images-idx3-ubyte", np.zeros((TRAIN, 27, 28)), r"train images are \(27, 28\) pixels"),
        ("train-labels-idx1-ubyte", np.zeros(TRAIN - 1), "600 train images but 599 labels"),
        ("train-labels-idx1-ubyte", np.full(TRAIN, 10), "a train label is 10, expected 0 to 9"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    folder: Path, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float64]], message: str
) -> None:
    replace(folder, name, idx(array.astype(np.uint8)))
    with pytest.raises(TaskError, match=message):
        FashionMNIST(folder=folder).batch(0, 0, 1)
