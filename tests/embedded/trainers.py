"""Work for trainers of other libraries, and the plain loop that does the same arithmetic."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import processes
import torch
from processes import flat
from torch import Tensor, nn
from torch.optim import AdamW

import decentral
from decentral.config import Run
from decentral.peer import Peer
from decentral.protocols import SyncRule

STEPS = 7
PARTS = 2
"""Backward passes to an optimizer step."""
BATCH = 4
LR = 0.01


LONG_S = 4 * processes.LONG_S
"""Importing a trainer takes seconds of a processor's time, in each process."""


class Never(SyncRule):
    """A rule whose phase lasts longer than any loop, and after which it does nothing."""

    async def run(self, peer: Peer) -> None:
        while await peer.train(10**6):
            pass


class Net(nn.Module):
    """Rows [B, 6] to a loss, in the form that Hugging Face's Trainer takes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers(x).square().mean()}


def made() -> Net:
    torch.manual_seed(3)
    return Net()


def rows(worker: int) -> Tensor:
    """Return a worker's samples, [STEPS * PARTS * BATCH, 6] float32."""
    return torch.randn(STEPS * PARTS * BATCH, 6, generator=torch.Generator().manual_seed(worker))


Training = Callable[[Net, Tensor, Any], Any]
"""Trains the model on rows, with a fleet or without one; returns whatever."""


def as_workers(
    place: dict[str, Any], run: Run, train: Training, elsewhere: str
) -> tuple[list[float], Any, list[float]]:
    """Return what a worker comes to with a trainer, what that one returns, and what the worker comes to by hand."""
    model, plain = made(), made()
    with decentral.join(run, **place) as fleet:
        returned = train(model, rows(place["worker"]), fleet)
    with decentral.join(run, **(place | {"address": elsewhere})) as fleet:
        optimizer = AdamW(plain.parameters(), lr=LR, weight_decay=0.0)
        sync = fleet.attach(plain, optimizer)
        loop(plain, optimizer, rows(place["worker"]), sync.step)
    return flat(model), returned, flat(plain)


def loop(model: Net, optimizer: AdamW, samples: Tensor, step: Callable[[], bool]) -> None:
    """Train as people do who write their loops themselves."""
    for parts in samples.view(STEPS, PARTS, BATCH, 6):
        for part in parts:
            (model(part)["loss"] / PARTS).backward()
        optimizer.step()
        optimizer.zero_grad()
        step()


def as_ranks(place: dict[str, Any], train: Training, elsewhere: str) -> tuple[list[float], list[float]]:
    """Return what a rank of a site of two comes to by itself, and with a rule beside it."""
    rank, port = str(place["worker"]), elsewhere.rpartition(":")[2]
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "a-test"}
    alone, joined = made(), made()
    train(alone, rows(0), None)
    with decentral.join(rule=Never(), **(place | {"worker": 0, "workers": 1})) as fleet:
        train(joined, rows(0), fleet)
    torch.distributed.destroy_process_group()
    return flat(alone), flat(joined)
