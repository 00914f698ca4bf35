"""SparseLoCo (arXiv 2508.15706): its equations on plain tensors, its merge, and DiLoCo as a special case."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, crash, drive, outcomes, quadratic, replicas, short
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Left, Synced
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import DiLoCo, Float32, Int8, OuterSGD, SparseLoCo, SparseMean
from decentral.protocols.codecs import ErrorFeedback, TopK
from decentral.protocols.merge import Mean
from decentral.sim.simulate import simulate

BIG = {"name": "quadratic", "dimension": 8192}


def top(k: int, chunk: int, decay: float) -> ErrorFeedback:
    return ErrorFeedback(codec=TopK(k=k, chunk=chunk, values=Float32()), decay=decay)


def reference(run: Run, period: int, k: int, chunk: int, beta: float, eta: float, divide: str) -> Tensor:
    """Residuals, top-k of each chunk, clipping to the median norm and outer SGD on plain float64 tensors."""
    task = quadratic(run)
    curvature = task.curvatures().double()
    anchor = torch.full((task.dimension,), task.start, dtype=torch.float64)
    residuals = [torch.zeros_like(anchor) for _ in range(run.fleet.size)]
    for _ in range(run.steps // period):
        sent = []
        for worker, residual in enumerate(residuals):
            centre = task.centre(worker).double()
            theta = centre + (1 - run.inner.lr * curvature) ** period * (anchor - centre)
            residual.mul_(beta).add_(anchor - theta)
            mine = torch.zeros_like(anchor)
            for start in range(0, len(anchor), chunk):
                best = residual[start : start + chunk].abs().argsort(descending=True)[:k] + start
                mine[best] = residual[best]
            residual -= mine
            sent.append(mine)
        norms = [each.norm().item() for each in sent]
        median = sorted(norms)[(len(norms) - 1) // 2]
        clipped = torch.stack([each * min(1.0, median / norm) for each, norm in zip(sent, norms, strict=True)])
        senders = (clipped != 0).sum(dim=0).clamp(min=1) if divide == "contributors" else len(sent)
        anchor = anchor - eta * clipped.sum(dim=0) / senders
    return anchor


@pytest.mark.parametrize("divide", ["workers", "contributors"])
@pytest.mark.parametrize(("workers", "beta", "eta"), [(1, 0.95, 1.0), (3, 0.95, 1.0), (4, 0.5, 0.7)])
def test_sparse_loco_equals_the_reference(workers: int, beta: float, eta: float, divide: str) -> None:
    merge = SparseMean.model_validate({"normalise": divide})
    rule = SparseLoCo(period=4, codec=top(3, 8, beta), outer=OuterSGD(lr=eta), merge=merge)
    run = cluster(rule, workers, 24, task={"name": "quadratic", "dimension": 30})
    outcome = simulate(run)
    assert all_equal(outcome)
    expected = reference(run, 4, 3, 8, beta, eta, divide)
    assert torch.allclose(outcome.params[0].double(), expected, rtol=0, atol=3e-6)


def test_all_elements_and_no_memory_is_diloco_with_outer_sgd_bit_for_bit() -> None:
    sparse = SparseLoCo(period=4, codec=top(8, 8, 0.0), outer=OuterSGD(lr=0.8), merge=Mean())
    plain = DiLoCo(period=4, outer=OuterSGD(lr=0.8))
    one, other = (simulate(cluster(rule, 3, 18, task=NET)) for rule in (sparse, plain))
    assert torch.equal(replicas(one), replicas(other))


def test_nothing_is_lost_in_the_residual() -> None:
    """With beta = 1: what the anchor moved by and what the worker still holds add up to its outer gradients."""
    rule = SparseLoCo(period=5, codec=top(2, 8, 1.0), merge=Mean())
    run = cluster(rule, 1, 5, task={"name": "quadratic", "dimension": 24})
    outcome = simulate(run)
    start = torch.full((24,), quadratic(run).start)
    moved = start - outcome.params[0]
    delta = start - quadratic(run).after_sgd(0, 0.1, 5)
    (residual,) = (slot for name, slot in outcome.slots[0].items() if name.endswith("residual"))
    assert (moved != 0).sum() == 6
    assert torch.allclose(moved + residual, delta, atol=1e-6)


# -- the merge --------------------------------------------------------------------------------------------------------


def test_a_long_contribution_is_scaled_down_to_the_median_norm() -> None:
    others = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0])]
    merged = SparseMean().merge([*others, torch.tensor([1e6, 0.0])], None)
    assert torch.allclose(merged, torch.tensor([8.0, 6.0]) / 3)


def test_norms_are_those_of_whole_vectors_however_long_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 2 is long in the first of four segments and short in the others, so no segment has its norm."""
    monkeypatch.setattr("decentral.protocols.collectives.SEGMENT", 16)

    async def script(peer: Peer) -> Tensor | None:
        values = torch.ones(64)
        if peer.id == 2:
            values[:16], values[16:] = 10.0, 0.5
        return await SparseLoCo(codec=Float32()).agreed_mean(peer, values)

    long = torch.cat([torch.full((16,), 10.0), torch.full((48,), 0.5)])
    for merged in drive(script, 3).values():
        assert torch.allclose(merged, (2 + long * (8 / long.norm())) / 3)


def test_contributors_are_those_who_sent_a_coordinate() -> None:
    sent = [torch.tensor([4.0, 0.0, 0.0]), torch.tensor([0.0, 6.0, 0.0]), torch.tensor([2.0, 0.0, 0.0])]
    for divide, expected in {"workers": [2.0, 2.0, 0.0], "contributors": [3.0, 6.0, 0.0]}.items():
        merge = SparseMean.model_validate({"clip": False, "normalise": divide})
        assert merge.merge(sent, None).tolist() == expected
        assert sent[0].tolist() == [4.0, 0.0, 0.0]


def test_a_liar_does_not_get_far() -> None:
    honest = [torch.randn(64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    far = SparseMean().merge([*honest, torch.full((64,), 1e9)], None)
    assert (far - torch.stack(honest).sum(dim=0) / 5).norm() <= max(each.norm() for each in honest) / 5 + 1e-4


# -- as a whole -------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_live_run_and_travel_in_146_times_fewer_bytes() -> None:
    rule = SparseLoCo()
    assert (rule.period.period, rule.codec.decay, rule.outer) == (30, 0.95, OuterSGD(lr=1.0))  # type: ignore[attr-defined]
    assert rule.codec.codec == TopK(k=64, chunk=4096)  # type: ignore[attr-defined]
    assert 32 * 4096 * 1000 / (8 * rule.codec.wire_bytes(4096 * 1000)) == pytest.approx(146, abs=6)
    outcome = simulate(cluster(SparseLoCo(period=5), 3, 60, task=BIG))
    assert all_equal(outcome)
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize("values", [Int8(), Float32()], ids=short)
def test_survivors_of_a_crash_are_equal(values: Int8 | Float32) -> None:
    codec = ErrorFeedback(codec=TopK(k=64, chunk=1024, values=values), decay=0.95)
    options = {"up_bps": 1e5, "down_bps": 1e5, "detection_s": 0.1}
    run = cluster(SparseLoCo(period=4, codec=codec), 4, 12, task=BIG, events=[crash(0.26, 1)], **options)  # type: ignore[arg-type]
    outcome = simulate(run)
    assert outcomes(outcome)[0] == {("degraded", (0, 2, 3))}
    assert all_equal(outcome)


def test_butterfly_is_refused() -> None:
    with pytest.raises(ConfigError, match="gather"):
        SparseLoCo(all_reduce="butterfly").check(3)


def test_timing_only_tells_the_same_story() -> None:
    run = cluster(SparseLoCo(period=4), 3, 12, task=BIG)

    def story(outcome: Outcome) -> list[object]:
        return [(r.time_s, r.worker, r.sent_bytes) for r in outcome.records if isinstance(r, (Synced, Left))]

    assert story(simulate(run, timing_only=True)) == story(simulate(run))
