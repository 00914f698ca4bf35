"""A worker as the Ray actor that `launch` makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
import safetensors.torch
import torch
from torch import Tensor

from decentral.config import Run, validated
from decentral.errors import RunError
from decentral.peer import Peer
from decentral.pipeline import Assembly
from decentral.replica import Replica
from decentral.snapshot import Snapshot
from decentral.workers import rpc
from decentral.workers.buffers import prepare_memory
from decentral.workers.cluster import host_here
from decentral.workers.resume import state_of
from decentral.workers.worker import Place, live

SLOT = "slot."
"""Prefix of the rule's buffers among the tensors of a result."""


class Worker:
    """Trains one replica. `table` is the run file's contents; `life` counts the actors of worker `worker`.

    Who is there when a run goes on from a checkpoint begins with its state in the folder `resumed`, if there is one.

    No method may be a coroutine: Ray would then run all of them on an event loop of its own.
    """

    def __init__(self, table: dict[str, Any], worker: int, life: int, secret: str, resumed: str = "") -> None:
        self._resumed = resumed
        self._table, self._worker, self._life, self._secret = table, worker, life, secret
        self._peer: Peer | None = None
        self._saved: Snapshot | None = None

    def placed(self) -> str:
        """Return Ray's name of the node on which there is a place for the worker."""
        node: str = ray.get_runtime_context().get_node_id()
        return node

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
            saved=self._begins_with(run),
        )
        self._peer, reason = asyncio.run(live(run, self._worker, self._life, place))
        return reason

    def give(self, need: Assembly) -> bytes:
        """Return what a new stage needs of the state that the worker has left with, as safetensors.

        Raises `RunError` if it has left without.
        """
        return safetensors.torch.save(self._given(need))

    def anew(self, table: dict[str, Any], worker: int, need: Assembly, *given: bytes) -> None:
        """Be that worker from now on, of a run whose model has been cut anew.

        It begins with what others have `given` and what the worker has itself. Raises `KeyError` for a part that nobody
        has, `RunError` if the worker left without its state.
        """
        parts = {} if self._peer is None else self._given(need)
        for each in given:
            parts |= safetensors.torch.load(each)
        self._saved = need.joined(parts)
        self._table, self._worker, self._life, self._peer = table, worker, 0, None

    def _given(self, need: Assembly) -> dict[str, Tensor]:
        if self._peer is None or self._peer.held is None:
            raise RunError(f"worker {self._worker} has left without its state")
        return need.given_by(self._worker, self._peer.held.tensors)

    def _begins_with(self, run: Run) -> Callable[[Replica], Snapshot] | None:
        if self._saved is not None:
            saved, self._saved = self._saved, None
            return lambda _replica: saved
        return partial(state_of, run, self._resumed, self._worker) if self._resumed else None

    def result(self) -> bytes:
        """Return the trained state as safetensors: `params` and `slot.<name>`, each `[P]` float32."""
        assert self._peer is not None
        tensors = {"params": self._peer.params, **{SLOT + name: slot for name, slot in self._peer.slots.items()}}
        return safetensors.torch.save({name: tensor.detach().cpu() for name, tensor in tensors.items()})
