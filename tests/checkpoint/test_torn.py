"""Of several checkpoints a torn one is never chosen, and what goes wrong in writing one is said and mended."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from shelf import OWNER, draft, fleet, manifest, same, snapshot, written

from decentral.checkpoint import Archive, Storage, StorageError, load, newest, reopen
from decentral.checkpoint.contents import describe
from decentral.checkpoint.manifest import DTYPES
from decentral.errors import ConfigError, RunError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "kept"


@pytest.fixture
def storage(place: Path) -> Storage:
    storage = Storage(str(place))
    Archive(storage, OWNER, 2).claim(resume=False)
    return storage


def test_what_was_written_is_read(storage: Storage) -> None:
    snapshots = fleet(7)
    folder = written(storage, snapshots)
    found = newest(storage)
    assert found is not None
    assert (found.folder, found.passed_over) == (folder, {})
    assert all(same(load(storage, found, worker), each) for worker, each in snapshots.items())


def test_a_worker_reopens_what_the_coordinator_found(storage: Storage) -> None:
    snapshots = fleet(7)
    folder = written(storage, snapshots)
    assert same(load(storage, reopen(storage, folder), 1), snapshots[1])
    with pytest.raises(RunError, match="00000009-beef: it has no manifest"):
        reopen(storage, "00000009-beef")


def test_every_kind_of_tensor_comes_back(storage: Storage) -> None:
    each = fleet(1, workers=1)[0]
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    tensors = {name: values.to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"scalar": torch.tensor(3), "empty": torch.empty(0, 4), "none": torch.tensor([float("nan")]).isnan()}
    each.tensors.update(tensors)  # type: ignore[attr-defined]
    written(storage, {0: each})
    found = newest(storage)
    assert found is not None
    assert same(load(storage, found, 0), each)


def test_a_type_that_nobody_knows_is_refused_by_name() -> None:
    each = snapshot(1, odd=torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(StorageError, match=r"'odd' is of type torch.complex128, and checkpoints know F64, F32"):
        describe(0, each)


def test_files_are_safetensors(storage: Storage, place: Path) -> None:
    written(storage, fleet(7))
    for path in place.rglob("worker-*.safetensors"):
        with safetensors.safe_open(path, "pt") as file:
            assert all(len(name) == 32 for name in file.keys())  # noqa: SIM118


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn part": (lambda at: (at / "worker-1.safetensors").open("r+b").truncate(500), "has 500 bytes instead of"),
    "missing part": (lambda at: (at / "worker-2.safetensors").unlink(), "has no bytes instead of"),
    "flipped byte": (lambda at: flip(at / "worker-0.safetensors", -1), "worker-0.safetensors is not what was written"),
    "flipped byte in a header": (lambda at: flip(at / "worker-0.safetensors", 12), "the header of worker-0"),
    "torn manifest": (lambda at: (at / "manifest.json").open("r+b").truncate(900), "its manifest cannot be read"),
    "empty manifest": (lambda at: (at / "manifest.json").write_text(""), "its manifest cannot be read"),
    "no manifest": (lambda at: (at / "manifest.json").unlink(), "it was never finished"),
    "another format": (
        lambda at: (at / "manifest.json").write_text((at / "manifest.json").read_text().replace('mat":2', 'mat":3')),
        "format 3 is not the one of this version",
    ),
    "a manifest that lacks a chunk": (lambda at: forget_a_file(at / "manifest.json"), "is in no file"),
    "a pickle": (lambda at: (at / "manifest.json").write_bytes(b"\x80\x04K\x01."), "its manifest cannot be read"),
}


def forget_a_file(path: Path) -> None:
    fields = json.loads(path.read_text())
    fields["files"].pop()
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_one_is_passed_over_and_said_why(how: str, storage: Storage, place: Path) -> None:
    spoil, reason = SPOILED[how]
    older, newer = written(storage, fleet(3)), written(storage, fleet(6))
    spoil(place / newer)
    found = newest(storage)
    assert found is not None
    assert found.folder == older
    assert found.manifest.step == 3
    assert list(found.passed_over) == [newer]
    assert reason in found.passed_over[newer]
    spoil(place / older)
    assert newest(storage) is None


def test_the_manifest_is_what_counts_wherever_writing_stops(storage: Storage, place: Path) -> None:
    """Killed after any number of files: the one before is there, whole."""
    older = written(storage, fleet(3))
    folder = Archive(storage, OWNER, 2).next_folder()
    descriptions, files = draft(storage, folder, fleet(6))
    shutil.copytree(place / folder, place / "aside")
    for parts in range(len(files) + 1):
        shutil.rmtree(place / folder)
        (place / folder).mkdir()
        for file in files[:parts]:
            shutil.copy(place / "aside" / file.name, place / folder)
        (place / folder / "manifest.json.tmp").write_text("{")
        found = newest(storage)
        assert found is not None
        assert found.folder == older
    Archive(storage, OWNER, 2).commit(folder, manifest(folder, descriptions, files))
    found = newest(storage)
    assert found is not None
    assert found.folder == folder


def test_order_is_by_number_whatever_clocks_say(storage: Storage, place: Path) -> None:
    import os

    older, newer = written(storage, fleet(3)), written(storage, fleet(6))
    for path in (place / newer).iterdir():
        os.utime(path, (0, 0))
    for path in (place / older).iterdir():
        os.utime(path, (4e9, 4e9))
    found = newest(storage)
    assert found is not None
    assert found.folder == newer


def test_old_ones_go_and_so_does_what_never_came_to_be(storage: Storage, place: Path) -> None:
    first = written(storage, fleet(1))
    draft(storage, Archive(storage, OWNER, 2).next_folder(), fleet(2))  # never committed
    kept = [written(storage, fleet(3))]
    assert (place / first).exists()
    kept.append(written(storage, fleet(4)))
    unfinished = Archive(storage, OWNER, 2).next_folder()
    draft(storage, unfinished, fleet(5))
    assert sorted(path.name for path in place.iterdir()) == [*kept, unfinished, "owner.json"]


@pytest.fixture
def little_space() -> Iterator[None]:
    """No file of this process may grow above 3,000 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("little_space")
def test_a_file_that_cannot_grow_is_an_error_that_says_so(storage: Storage) -> None:
    with pytest.raises(StorageError, match=r"cannot write 00000001-beef/worker-0.safetensors: .*File too large"):
        written(storage, fleet(3))
    assert newest(storage) is None


def test_a_place_where_nobody_may_write() -> None:
    with pytest.raises(StorageError, match=r"/proc/decentral: cannot write owner.json: "):
        Archive(Storage("/proc/decentral"), OWNER, 2).claim(resume=False)


def test_a_run_does_not_write_where_another_one_has(storage: Storage) -> None:
    written(storage, fleet(3))
    with pytest.raises(ConfigError, match="holds another run's checkpoints; name another place, or go on"):
        Archive(storage, "cafe", 2).claim(resume=False)


def test_a_run_that_was_resumed_elsewhere_commits_nothing_any_more(storage: Storage) -> None:
    written(storage, fleet(3))
    Archive(storage, "cafe", 2).claim(resume=True)
    with pytest.raises(RunError, match="another run writes its checkpoints here now"):
        written(storage, fleet(6))
    theirs = written(storage, fleet(5), owner="cafe")
    found = newest(storage)
    assert found is not None
    assert found.folder == theirs


def test_workers_that_write_elsewhere_under_the_same_name_make_no_checkpoint(storage: Storage, place: Path) -> None:
    archive = Archive(storage, OWNER, 2)
    folder = archive.next_folder()
    descriptions, files = draft(storage, folder, fleet(3))
    (place / folder / "worker-1.safetensors").unlink()  # it is on worker 1's own disk
    with pytest.raises(StorageError, match="all machines must reach the same place by this URL"):
        archive.commit(folder, manifest(folder, descriptions, files))
    assert newest(storage) is None


def test_a_byte_that_changes_after_the_checkpoint_was_found(storage: Storage, place: Path) -> None:
    folder = written(storage, fleet(3))
    found = newest(storage)
    assert found is not None
    flip(place / folder / "worker-1.safetensors", -1)
    with pytest.raises(RunError, match="it was whole when the run began"):
        load(storage, found, 1)


def test_urls_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.url: nonsense://x is nothing that fsspec knows"):
        Storage("nonsense://x")


def test_a_missing_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://bucket/run needs a driver .*; pip install 'decentral\[gs\]'"):
        Storage("gs://bucket/run")
