"""Who writes what of a checkpoint: chunks that several workers hold are written once, and everybody writes as much."""

from __future__ import annotations

from collections.abc import Mapping

from decentral.checkpoint.manifest import Description

Shares = dict[int, tuple[str, ...]]
"""The digests of the chunks that each worker writes, in the order in which they stand in its file."""


def plan(descriptions: Mapping[int, Description]) -> Shares:
    """Return a share for each worker: every chunk is in one share, of a worker that holds it.

    Chunks that few hold come first, large ones before small ones; each goes to the holder with the fewest bytes so far.
    So if all hold the same the shares differ by one chunk at most.
    """
    sizes: dict[str, int] = {}
    holders: dict[str, list[int]] = {}
    for worker, description in sorted(descriptions.items()):
        for held in description.tensors:
            for digest, nbytes in held.sizes():
                sizes[digest] = nbytes
                workers = holders.setdefault(digest, [])
                if worker not in workers[-1:]:  # it may hold the same bytes more than once
                    workers.append(worker)
    load = dict.fromkeys(sorted(descriptions), 0)
    shares: dict[int, list[str]] = {worker: [] for worker in load}
    for digest in sorted(holders, key=lambda digest: (len(holders[digest]), -sizes[digest])):
        worker = min(holders[digest], key=lambda worker: (load[worker], worker))
        load[worker] += sizes[digest]
        shares[worker].append(digest)
    return {worker: tuple(share) for worker, share in shares.items()}


def uneven(descriptions: Mapping[int, Description]) -> str:
    """Return how the workers stand apart; nothing, if between the same two rounds of each channel they share."""
    shared = set.intersection(*(set(description.rounds) for description in descriptions.values()))
    for channel in sorted(shared):
        by_number: dict[int, list[int]] = {}
        for worker, description in sorted(descriptions.items()):
            by_number.setdefault(description.rounds[channel], []).append(worker)
        if len(by_number) > 1:
            return "; ".join(
                f"workers {workers} after round {number} of '{channel}'" for number, workers in by_number.items()
            )
    return ""
