"""Sites of several ranks each, whose model is replicated or sharded within the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Crew
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import decentral
from decentral.config import Run
from decentral.protocols import DiLoCo, LocalSGD

RANKS = 2
STEPS = 5


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    if kind == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(model: nn.Module) -> list[float]:
    """Return all parameters, one after the other; all ranks of the site call it."""
    parts: list[Tensor] = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.parameters()]
    return torch.cat([part.detach().view(-1) for part in parts]).tolist()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, chance: torch.Generator) -> None:
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(4, 6, generator=chance)).square().mean()
    loss.backward()
    optimizer.step()


def rank_of_a_site(place: dict[str, Any], tell: Any, kind: str, run: Run, folder: Path) -> list[list[float]]:
    """Return the parameters right before and after the last round."""
    site, rank = divmod(place["worker"], RANKS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/site{site}", rank=rank, world_size=RANKS)
    model = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    chance = torch.Generator().manual_seed(place["worker"])
    with decentral.join(run, **(place | {"worker": site, "workers": 2})) as fleet:
        sync = fleet.attach(model, optimizer, group=dist.group.WORLD)
        assert (fleet.worker, fleet.workers) == (site, 2)
        for _ in range(STEPS):  # the last round comes when the loop ends, in the midst of a phase
            step(model, optimizer, chance)
            sync.step()
        before = whole(model)
    after = whole(model)
    dist.destroy_process_group()
    return [before, after]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_sites_average_their_models(kind: str, tmp_path: Path) -> None:
    with Crew(rank_of_a_site, 2 * RANKS, kind, Run(rule=LocalSGD(period=2)), tmp_path) as crew:
        crew.start(*range(2 * RANKS))
        answers = torch.tensor(crew.answers())
    before, after = answers[:, 0], answers[:, 1]
    assert before[0].equal(before[1])
    assert before[2].equal(before[3])
    assert not before[0].equal(before[2])
    assert all(each.equal(after[0]) for each in after)
    assert torch.allclose(after[0], (before[0] + before[2]) / 2, rtol=0, atol=1e-7)


def with_and_without(place: dict[str, Any], tell: Any, run: Run, folder: Path) -> list[list[float]]:
    """Return what a rank's loop comes to by itself, and with a rule beside it that has no round meanwhile."""
    rank = place["worker"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/site", rank=rank, world_size=RANKS)
    ended = []
    for joins in (False, True):
        model = made("fsdp")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        compiled = torch.compile(model, backend="aot_eager")
        chance = torch.Generator().manual_seed(rank)
        with decentral.join(run, **(place | {"worker": 0, "workers": 1})) as fleet:
            sync = fleet.attach(compiled, optimizer, group=dist.group.WORLD) if joins else None
            for _ in range(STEPS):
                step(compiled, optimizer, chance)
                assert sync is None or sync.step()
            ended.append(whole(model))
    dist.destroy_process_group()
    return ended


def test_between_rounds_a_sharded_compiled_loop_in_mixed_precision_comes_to_its_own_bits(tmp_path: Path) -> None:
    with Crew(with_and_without, RANKS, Run(rule=DiLoCo(period=10**6)), tmp_path) as crew:
        crew.start(*range(RANKS))
        for alone, joined in crew.answers():
            assert alone == joined
