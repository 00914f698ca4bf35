"""AutoLoCo: phases that grow and an outer optimiser that follows them, in closed forms and against a reference."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster, replicas
from plain import NOISY, Plain, close
from torch import Tensor

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.protocols import AutoLoCo, DiLoCo, Float32, Growing, Int8, MatchedRandom, Nesterov, Outer, OuterSGD
from decentral.sim.simulate import simulate


def reference(run: Run, lengths: list[int], h_ref: int, eta: float, mu: float) -> Tensor:
    """Nesterov in terms of the workers' mean speed v and its memory m, in local steps; plain tensors."""
    plain = Plain(run)
    anchor = plain.start()
    m, first = torch.zeros_like(anchor), 0
    for length in lengths:
        ends = [plain.sgd(worker, range(first, first + length), anchor, run.inner.lr) for worker in plain.workers]
        v = (anchor - torch.stack(ends).mean(dim=0)) / length
        kept = mu ** (length / h_ref)
        m = kept * m + (1 - kept) * v
        gain = eta / (1 - mu)  # what a constant speed comes to in the end
        anchor = anchor - gain * length * ((1 - kept) * v + kept * m)
        first += length
    return anchor


def test_autoloco_equals_the_reference() -> None:
    rule = AutoLoCo(period=Growing(base=2, horizon=4, power=1.0), reference=3, codec=Float32())
    run = cluster(rule, 3, 30, task=NOISY, batch_size=2)
    outcome = simulate(run)
    assert all_equal(outcome)
    assert close(outcome.params[0], reference(run, [2, 3, 4, 6, 9, 6], 3, 0.7, 0.9))


@pytest.mark.parametrize("outer", [Nesterov(), OuterSGD(lr=0.5, momentum=0.4), OuterSGD()])
def test_at_the_reference_period_it_is_diloco_bit_for_bit(outer: Outer) -> None:
    grown = simulate(cluster(AutoLoCo(period=4, reference=4, outer=outer, codec=Float32()), 3, 16, task=NET))
    diloco = simulate(cluster(DiLoCo(period=4, outer=outer), 3, 16, task=NET))
    assert torch.equal(replicas(grown), replicas(diloco))


@pytest.mark.parametrize("outer", [Nesterov(), OuterSGD(lr=0.5, momentum=0.8)])
def test_a_stretched_optimiser_remembers_as_many_steps_and_moves_as_far(outer: Nesterov | OuterSGD) -> None:
    for ratio in (0.25, 1.0, 3.0):
        other = outer.stretched(ratio)
        assert isinstance(other, (Nesterov, OuterSGD))
        assert other.momentum ** (1 / ratio) == pytest.approx(outer.momentum)
        anchor, momentum = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for _ in range(1000):
            before = anchor.clone()
            other.step(anchor, torch.full((1,), ratio, dtype=torch.float64), momentum)  # speed 1
        assert (before - anchor).item() == pytest.approx(ratio * outer.lr / (1 - outer.momentum))


def test_a_change_of_h_does_not_disturb_a_steady_speed() -> None:
    """The memory is of speed, so after long phases of H = 4 a phase of another length goes on at the same speed."""
    task = {"name": "quadratic", "dimension": 4, "curvature": (1e-3, 1e-3), "start": 1e3, "spread": 0.0}  # gradient 1
    ends = []
    for steps in (60, 69, 70):  # phases of 4, then one of 9 or of 10
        rule = AutoLoCo(period=Sudden(), reference=4, outer=Nesterov(lr=0.1, momentum=0.5), codec=Float32())
        ends.append(simulate(cluster(rule, 1, steps, task=task)).params[0].double().mean().item())
    assert (ends[0] - ends[1]) / 9 == pytest.approx(0.1 * 0.1 / 0.5, rel=0.01)  # inner lr x outer gain
    assert (ends[0] - ends[2]) / 10 == pytest.approx(0.1 * 0.1 / 0.5, rel=0.01)


class Sudden(Growing):
    """Phases of 4 steps up to step 60, and of 10 from then on."""

    def phase(self, step: int, total_steps: int, inner: object) -> int:
        return 4 if step < 60 else 10


def test_the_control_sends_as_much_and_comes_to_something_else() -> None:
    law = Growing(base=2, horizon=4, power=1.0)
    grown, control = (
        simulate(cluster(AutoLoCo(period=period, reference=4), 3, 30, task=NOISY))
        for period in (law, MatchedRandom(schedule=law))
    )
    assert grown.left()[0].sent_bytes == control.left()[0].sent_bytes
    assert not torch.equal(grown.params[0], control.params[0])


def test_an_outer_optimiser_that_cannot_be_stretched_is_refused_before_anything_runs() -> None:
    class Sign(Outer):
        lr: float = 0.1

        def step(self, anchor: Tensor, gradient: Tensor, momentum: Tensor) -> None:
            anchor.sub_(gradient.sign(), alpha=self.lr)

    with pytest.raises(ConfigError, match="no momentum that could follow"):
        cluster(AutoLoCo(outer=Sign()), 3).check()


def test_updates_travel_as_int8_unless_told_otherwise() -> None:
    assert AutoLoCo().codec == Int8()
