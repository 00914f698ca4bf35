"""A worker as the Ray actor that `launch` makes of it."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
import safetensors.torch
import torch

from decentral.config import validated
from decentral.peer import Peer
from decentral.workers import rpc
from decentral.workers.buffers import prepare_memory
from decentral.workers.cluster import host_here
from decentral.workers.worker import Place, live

SLOT = "slot."
"""Prefix of the rule's buffers among the tensors of a result."""


class Worker:
    """Trains one replica. `table` is the run file's contents; `life` counts the actors of worker `worker`.

    Who is there when a run goes on from a checkpoint begins with its state in the folder `resumed`.

    No method may be a coroutine: Ray would then run all of them on an event loop of its own.
    """

    def __init__(self, table: dict[str, Any], worker: int, life: int, secret: str, resumed: str | None = None) -> None:
        self._resumed = resumed
        self._table, self._worker, self._life, self._secret = table, worker, life, secret
        self._peer: Peer | None = None

    def placed(self) -> None:
        """Return: there is a place for the worker."""

    def run(self, coordinator: str) -> str:
        """Join at the coordinator's address, train, leave; return why the worker left.

        Raises `TaskError`, `ConfigError` or `RunError` as the driver shall see it.
        """
        prepare_memory()
        run = validated(self._table, "run")
        torch.set_num_threads(run.real.threads)
        place = Place(
            coordinator,
            rpc.Keys.here(self._secret, run.real.certificates),
            host=host_here(),
            device=torch.device("cuda" if ray.get_gpu_ids() else "cpu"),
            resumed=self._resumed,
        )
        self._peer, reason = asyncio.run(live(run, self._worker, self._life, place))
        return reason

    def result(self) -> bytes:
        """Return the trained state as safetensors: `params` and `slot.<name>`, each `[P]` float32."""
        assert self._peer is not None
        tensors = {"params": self._peer.params, **{SLOT + name: slot for name, slot in self._peer.slots.items()}}
        return safetensors.torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()})
