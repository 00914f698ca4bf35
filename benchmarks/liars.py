"""What lying workers do to DiLoCo under each merge: final held-out loss relative to the same run without the liars.

Run from the repository's root (about a quarter of an hour on a busy machine):

    python -m benchmarks.liars

The last one of five workers, or two of eight, lie in every round, in ways from the literature; the omniscient ones see
what all honest workers are about to contribute. Two tasks: a noisy quadratic whose workers have different data, and a
small byte GPT. Printed is the median over three seeds, of the quadratic's data and of the GPT's initial weights; 1 is
as good as the honest workers alone with a plain mean, "lost" a loss that is not finite or a thousand times as large.
The column "none" is the price of the merge where all are honest. The norm limit of rounds is off, so that it does not
take the merges' work, but for one row.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import PrivateAttr
from torch import Tensor

from decentral.config import Run
from decentral.errors import TaskError
from decentral.fleet import Fleet, WorkerGroup
from decentral.inner import SGD, AdamW, Inner
from decentral.peer import Peer
from decentral.protocols import DiLoCo, Nesterov
from decentral.protocols.merge import Mean, Merge
from decentral.protocols.robust import (
    CenteredClipping,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestNeighborMixing,
    TrimmedMean,
)
from decentral.sim.simulate import simulate

SEEDS = (0, 1, 2)
CASES = (("quadratic, different data", 5, 1), ("quadratic, different data", 8, 2), ("byte GPT", 5, 1))  # workers, liars
LOST = 1000.0


class Sight(NamedTuple):
    """What a liar knows in a round: the honest updates `[h, P]`, its own, and its own of the first round, `[P]`."""

    honest: Tensor
    own: Tensor
    first: Tensor
    generator: torch.Generator


def inner_product(scale: float) -> Callable[[Sight], Tensor]:
    """Return inner-product manipulation: minus the honest mean. Xie et al., arXiv 1903.03936."""
    return lambda sight: sight.honest.mean(dim=0) * -scale


def a_little(sight: Sight) -> Tensor:
    """Return "a little is enough", the honest mean less 1.5 standard deviations. Baruch et al., arXiv 1902.06156."""
    return sight.honest.mean(dim=0) - 1.5 * sight.honest.std(dim=0)


def noise(sight: Sight) -> Tensor:
    """Return normal numbers, ten times as large as the worker's own."""
    normals = torch.randn(sight.own.shape, generator=sight.generator)
    return normals * 10 * sight.own.square().mean().sqrt()


ATTACKS: dict[str, Callable[[Sight], Tensor]] = {
    "none": lambda sight: sight.own,
    "sign flip": lambda sight: -sight.own,
    "ALIE 1.5": a_little,
    "IPM 0.1": inner_product(0.1),
    "IPM 1": inner_product(1.0),
    "IPM 10": inner_product(10.0),
    "Gaussian": noise,
    "NaN": lambda sight: torch.full_like(sight.own, math.nan),
    "replay": lambda sight: sight.first,
    "times 1e5": lambda sight: sight.own * 1e5,
}


class Board:
    """Where the honest workers of a simulated run show their updates before they contribute them."""

    def __init__(self, honest: int) -> None:
        self._honest = honest
        self._shown: dict[int, dict[int, Tensor]] = {}
        self._complete: dict[int, asyncio.Event] = {}
        self.first: dict[int, Tensor] = {}

    def show(self, step: int, worker: int, values: Tensor) -> None:
        shown = self._shown.setdefault(step, {})
        shown[worker] = values
        if len(shown) == self._honest:
            self._complete.setdefault(step, asyncio.Event()).set()

    async def see(self, step: int) -> Tensor:
        """Return all honest updates of the round after `step` local steps, `[h, P]`."""
        await self._complete.setdefault(step, asyncio.Event()).wait()
        return torch.stack([self._shown[step][worker] for worker in sorted(self._shown[step])])


class LyingDiLoCo(DiLoCo):
    """DiLoCo of which the workers from `honest` on contribute what the attack makes of their update."""

    name = "lying_diloco"
    honest: int
    attack: str
    _board: Board = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._board = Board(self.honest)

    async def agreed_mean(self, peer: Peer, values: Tensor, weight: int = 1) -> Tensor | None:
        if peer.id < self.honest:
            self._board.show(peer.step, peer.id, values)
        else:
            first = self._board.first.setdefault(peer.id, values)
            generator = torch.Generator().manual_seed(1000 * peer.step + peer.id)
            values = ATTACKS[self.attack](Sight(await self._board.see(peer.step), values, first, generator))
        return await super().agreed_mean(peer, values, weight)


class Work(NamedTuple):
    """What is trained."""

    task: dict[str, Any]
    inner: Inner
    batch_size: int
    steps: int
    period: int


def works(honest: int, seed: int) -> dict[str, Work]:
    """Return the tasks; the quadratic has a seed of its own, for centres and noise."""
    bowl = {
        "name": "quadratic",
        "dimension": 100,
        "spread": 0.3,
        "noise": 1.0,
        "seed": seed,
        "eval_workers": honest,
    }
    gpt = {"name": "byte_gpt", "width": 32, "depth": 1, "context": 32, "eval_windows": 128}
    return {
        "quadratic, different data": Work(bowl, SGD(lr=0.1), 4, 100, 10),
        "byte GPT": Work(gpt, AdamW(lr=0.01), 4, 60, 6),
    }


def loss_of(work: Work, seed: int, rule: DiLoCo, workers: int, norm_limit: float = 0.0) -> float:
    """Return the held-out loss at the end, infinity if a worker's loss was not finite."""
    run = Run(
        seed=seed,
        steps=work.steps,
        batch_size=work.batch_size,
        evaluate_every=0,
        norm_limit=norm_limit,
        task=work.task,
        inner=work.inner,
        rule=rule,
        fleet=Fleet(workers=(WorkerGroup(count=workers),)),
    )
    try:
        loss = simulate(run).after["loss"]
    except TaskError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def merges(liars: int) -> dict[str, tuple[Merge, float]]:
    """Return what is compared: the merge and the norm limit."""
    return {
        "mean": (Mean(), 0.0),
        "mean, norm limit 100": (Mean(), 100.0),
        "median": (Median(), 0.0),
        "trimmed mean": (TrimmedMean(liars=liars), 0.0),
        "Krum": (Krum(liars=liars), 0.0),
        "Multi-Krum": (MultiKrum(liars=liars), 0.0),
        "geometric median": (GeometricMedian(), 0.0),
        "centered clipping": (CenteredClipping(), 0.0),
        "mixing, median": (NearestNeighborMixing(liars=liars), 0.0),
    }


def table(name: str, workers: int, liars: int) -> None:
    """Print a table of merges and attacks."""
    honest = workers - liars
    seeded = {seed: works(honest, seed)[name] for seed in SEEDS}
    period = seeded[SEEDS[0]].period
    fields: dict[str, Any] = {"period": period, "outer": Nesterov(lr=0.7, momentum=0.5), "all_reduce": "gather"}
    alone = {seed: loss_of(work, seed, DiLoCo(**fields), honest) for seed, work in seeded.items()}
    print(" " * 22 + "".join(f"{attack:>11}" for attack in ATTACKS))
    for merge_name, (merge, norm_limit) in merges(liars).items():
        shown = []
        for attack in ATTACKS:
            ratios = []
            for seed, work in seeded.items():
                rule = LyingDiLoCo(**fields, merge=merge, honest=honest, attack=attack)
                ratios.append(loss_of(work, seed, rule, workers, norm_limit) / alone[seed])
            ratio = statistics.median(ratios)
            shown.append(f"{ratio:.3f}" if ratio < LOST else "lost")
        print(f"{merge_name:22}" + "".join(f"{cell:>11}" for cell in shown), flush=True)


def main() -> None:
    """Print all tables."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    for name, workers, liars in CASES:
        print(f"\n{name}: {liars} of {workers} lie")
        table(name, workers, liars)
    print(f"\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
