"""Whether what a worker keeps fits into its device's memory."""

from __future__ import annotations

from collections.abc import Iterable

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.fleet.devices import device_named
from decentral.peer import Peer

FLOAT32_BYTES = 4
GIB = 2**30


def check_memory(run: Run, peers: Iterable[Peer]) -> None:
    """Raise `ConfigError`, with the figures, if a worker's replica and the rule's slots exceed its device's memory.

    Parameters, gradients, the inner optimiser's state and the slots made so far count, in float32; with `real.offload`
    slots are in host memory. Activations, which depend on the model's code, come on top and are not counted.
    """
    groups = run.fleet.each()
    for peer in peers:
        slots = sum(slot.numel() for slot in peer.slots.values())
        check_worker(run, peer.id, groups[peer.id].device, peer.layout.size, slots)


def check_worker(run: Run, worker: int, device: str | None, parameters: int, slots: int) -> None:
    """Do so for one worker whose slots have so many elements in all."""
    if device is None:
        return
    replica = FLOAT32_BYTES * parameters
    parts = {
        "parameters": replica,
        "gradients": replica,
        "inner optimiser": replica * (len(run.inner.momenta) + len(run.inner.variances)),
        "rule": 0 if run.real.offload else FLOAT32_BYTES * slots,
    }
    memory = device_named(device).memory_gib * GIB
    if sum(parts.values()) > memory:
        told = ", ".join(f"{what} {nbytes / GIB:.1f}" for what, nbytes in parts.items())
        raise ConfigError(
            f"fleet.workers: worker {worker} is a {device} with {memory / GIB:g} GiB, and needs "
            f"{sum(parts.values()) / GIB:.1f} GiB before activations: {told}; take a larger device, a smaller "
            "model, or real.offload = true"
        )
