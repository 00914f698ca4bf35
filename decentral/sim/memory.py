"""Whether what a worker keeps fits into its device's memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from decentral.config import Run
from decentral.fleet.devices import device_named
from decentral.peer import Peer
from decentral.pipeline.memory import FLOAT32_BYTES, GIB, Stages, require_room, state_bytes
from decentral.pipeline.stage import PhantomStage, TorchStage
from decentral.replica import Replica
from decentral.task import Task


def memory_check(run: Run, task: Task, replicas: Sequence[Replica]) -> Callable[[Iterable[Peer]], None]:
    """Return what raises `ConfigError`, with the figures, if what a worker keeps exceeds its device's memory.

    Parameters, gradients, the inner optimiser's state and the slots made so far count, in float32; with `real.offload`
    slots are in host memory. Of a stage, copies of others and activations count too; those of a whole model, which
    goes through its batch as the model's code likes, come on top.
    """
    groups, first = run.fleet.each(), replicas[0]
    memory = [math.inf if group.device is None else _memory(group.device) for group in groups]
    stages = None
    if isinstance(first, TorchStage | PhantomStage):
        stages = Stages(run.pipeline, first.cut, task, run.seed, run.batch_size, run.inner, run.fleet)
    room = [min(memory[stage :: run.pipeline.stages]) for stage in range(run.pipeline.stages)]

    def check(peers: Iterable[Peer]) -> None:
        for peer in peers:
            device, slots = groups[peer.id].device, sum(slot.numel() for slot in peer.slots.values())
            if stages is None or device is None:
                check_worker(run, peer.id, device, peer.layout.size, slots)
            else:
                stages.require_room(_who(peer.id, device), peer.id, room, slots)

    return check


def check_worker(run: Run, worker: int, device: str | None, parameters: int, slots: int) -> None:
    """Do so for one worker with a whole model, whose slots have so many elements in all."""
    if device is None:
        return
    rule = 0 if run.real.offload else FLOAT32_BYTES * slots
    parts = {**state_bytes(run.inner, parameters), "rule": rule}
    larger = "a larger device, a smaller model, or real.offload = true"
    require_room(_who(worker, device), _memory(device), parts, lambda: larger, " before activations")


def _who(worker: int, device: str) -> str:
    return f"fleet.workers: worker {worker} is a {device}"


def _memory(device: str) -> float:
    return device_named(device).memory_gib * GIB
