"""Checkpoints without a run: snapshots made up, and written as workers and coordinator do."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.checkpoint import Archive, Description, File, Manifest, Storage
from decentral.checkpoint.archive import write_share
from decentral.checkpoint.contents import describe
from decentral.checkpoint.plan import plan
from decentral.snapshot import Life, Snapshot

OWNER = "beef"


def snapshot(step: int, **tensors: Tensor) -> Snapshot:
    """Return a snapshot after `step` local steps with these tensors."""
    life = Life(
        time_s=0.5 * step,
        samples=4 * step,
        records=step,
        inner_steps=step,
        next_evaluation=2 * step,
        evaluated=False,
        own_slots=("residual",),
        seconds={"compute": 0.25 * step},
        sent_bytes=0,
        received_bytes=0,
        messages_sent=0,
    )
    return Snapshot(step, {"sync": step}, tensors, life)


def fleet(step: int, workers: int = 3, size: int = 1000) -> dict[int, Snapshot]:
    """Return snapshots of workers with the same parameters and a residual each."""
    shared = torch.arange(size, dtype=torch.float32) + step
    return {
        worker: snapshot(step, params=shared.clone(), **{"slot residual": torch.full((size,), float(worker))})
        for worker in range(workers)
    }


def draft(storage: Storage, folder: str, snapshots: dict[int, Snapshot]) -> tuple[dict[int, Description], list[File]]:
    """Write everything of a checkpoint but its manifest."""
    descriptions = {worker: describe(worker, each) for worker, each in snapshots.items()}
    shares = plan(descriptions)
    files = [
        write_share(storage, folder, snapshots[worker], descriptions[worker], shares[worker]) for worker in snapshots
    ]
    return descriptions, files


def written(storage: Storage, snapshots: dict[int, Snapshot], *, owner: str = OWNER, keep: int = 2) -> str:
    """Write a checkpoint into the storage, which `owner` has claimed; return its folder."""
    archive = Archive(storage, owner, keep)
    folder = archive.next_folder()
    descriptions, files = draft(storage, folder, snapshots)
    archive.commit(folder, manifest(folder, descriptions, files, owner))
    return folder


def manifest(folder: str, descriptions: dict[int, Description], files: list[File], owner: str = OWNER) -> Manifest:
    return Manifest(
        number=int(folder.split("-")[0]),
        owner=owner,
        decentral="0",
        torch="0",
        run={"steps": 10},
        journal={},
        extra={},
        workers=descriptions,
        files=tuple(files),
    )


def same(one: Snapshot, other: Snapshot) -> bool:
    """Return whether two snapshots are equal, bit for bit."""
    return (
        (one.step, dict(one.rounds), one.life) == (other.step, dict(other.rounds), other.life)
        and one.tensors.keys() == other.tensors.keys()
        and all(
            values.dtype == other.tensors[name].dtype and values.equal(other.tensors[name])
            for name, values in one.tensors.items()
        )
    )
