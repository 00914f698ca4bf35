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
        device = groups[peer.id].device
        if device is None:
            continue
        replica = FLOAT32_BYTES * peer.layout.size
        parts = {
            "parameters": replica,
            "gradients": replica,
            "inner optimiser": replica * (len(run.inner.momenta) + len(run.inner.variances)),
            "rule": 0 if run.real.offload else sum(FLOAT32_BYTES * slot.numel() for slot in peer.slots.values()),
        }
        memory = device_named(device).memory_gib * GIB
        if sum(parts.values()) > memory:
            told = ", ".join(f"{what} {nbytes / GIB:.1f}" for what, nbytes in parts.items())
            raise ConfigError(
                f"fleet.workers: worker {peer.id} is a {device} with {memory / GIB:g} GiB, and needs "
                f"{sum(parts.values()) / GIB:.1f} GiB before activations: {told}; take a larger device, a smaller "
                "model, or real.offload = true"
            )
