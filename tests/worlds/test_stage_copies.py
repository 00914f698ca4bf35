"""Stages that other stages can stand in for, or keep copies of: what comes back, and from where."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from blocks import Chain, Mirrored, named
from sockets import train_here
from test_lost_stages import breaking
from test_same_rule import assert_same_replicas
from torch import Tensor

from decentral.config import Run, validated
from decentral.errors import ConfigError
from decentral.journal import Left, Rebuilt, Trained
from decentral.outcome import Outcome
from decentral.peer import Peer
from decentral.protocols import LocalSGD, SyncRule
from decentral.protocols.codecs import Float32
from decentral.sim.simulate import simulate
from decentral.wire import Tag, largest_packet

STEPS, STAGES = 30, 4
CRASH_S, BACK_S = 4.3, 5.5
GPT = {"name": "byte_gpt", "width": 16, "depth": 4, "heads": 2, "context": 16, "eval_windows": 8}


class Flood(SyncRule):
    """Sends half a million numbers at once."""

    name = "flood"

    async def run(self, peer: Peer) -> None:
        while await peer.train(1):
            peer.send(
                (peer.id + 1) % len(peer.members),
                Tag("flood", peer.step, "all"),
                Float32().encode(torch.zeros(500_000)),
            )


def run_of(recovery: Any, *, lost: tuple[int, ...] = (), crash_s: float = CRASH_S, **fields: Any) -> Run:
    """Return a run of one replica in which these workers crash once."""
    events = []
    for worker in lost:
        events += [{"kind": "crash", "worker": worker, "at_s": crash_s}]
        events += [{"kind": "join", "worker": worker, "at_s": BACK_S}]
    return validated(
        {
            "steps": STEPS,
            "batch_size": 4,
            "evaluate_every": 5,
            "patience_s": 10.0,
            "task": GPT,
            "rule": {"name": "local_sgd", "period": 5},
            "inner": {"name": "adamw", "lr": 3e-3, "clip_norm": 1.0},
            "pipeline": {"stages": STAGES, "microbatches": 4, "recovery": recovery},
            "fleet": {"workers": [{"count": STAGES}], "events": events, "detection_s": 0.2},
            **fields,
        },
        "test",
    )


@cache
def undisturbed(recovery: str) -> Outcome:
    """Return the run in which nobody is lost, simulated once for all that are compared with it."""
    return simulate(run_of(recovery))


def rebuilt(outcome: Outcome) -> list[tuple[int, tuple[int, ...]]]:
    return [(record.worker, record.members) for record in outcome.records if isinstance(record, Rebuilt)]


def steps_done(outcome: Outcome) -> set[int]:
    return {
        max(record.step for record in outcome.records if isinstance(record, Trained) and record.worker == worker)
        for worker in outcome.params
    }


class Noting(LocalSGD):
    """Notes what every worker has at the beginning of each of its lives, and after each local step."""

    async def run(self, peer: Peer) -> None:
        BEGUN.append((peer.id, peer.step, peer.params.clone()))
        BELIEVED.append(peer.replica.inner_steps)
        peer.keepers.append(_Note(peer))
        await super().run(peer)


class _Note:
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def rest(self) -> None:
        SEEN[self._peer.id, self._peer.step] = self._peer.params.clone()


BEGUN: list[tuple[int, int, Tensor]] = []
BELIEVED: list[int] = []  # steps that the inner optimiser believes it has done then
SEEN: dict[tuple[int, int], Tensor] = {}


def noted(run: Run, simulated: bool = True) -> tuple[Outcome, list[tuple[int, int, Tensor]], dict[Any, Tensor]]:
    BEGUN.clear()
    SEEN.clear()
    run = run.model_copy(update={"rule": Noting(period=1)})
    outcome = simulate(run) if simulated else train_here(run, lives=2)
    return outcome, list(BEGUN), dict(SEEN)


@cache
def seen_undisturbed(recovery: str) -> dict[Any, Tensor]:
    """Return what every worker has after each local step of the run in which nobody is lost."""
    _, _, seen = noted(run_of(recovery))
    return seen


def assert_same_training(outcome: Outcome, quiet: Outcome) -> None:
    for worker, params in quiet.params.items():
        assert outcome.params[worker].equal(params), f"worker {worker}"
        assert all(slot.equal(quiet.slots[worker][name]) for name, slot in outcome.slots[worker].items())
    assert outcome.samples() == quiet.samples()


@pytest.mark.parametrize("victim", range(STAGES))
def test_a_stage_of_which_copies_are_kept_goes_on_as_if_nothing_had_happened(victim: int) -> None:
    """Parameters and inner optimiser are those of a run in which nobody is lost, to the bit."""
    quiet = undisturbed("redundant")
    outcome = simulate(run_of("redundant", lost=(victim,)))
    assert rebuilt(outcome) == [(victim, ((victim - 1) % STAGES,))]
    assert_same_training(outcome, quiet)
    assert undisturbed("checkfree").merged().equal(quiet.merged())  # copies change nothing


def test_copies_follow_what_rounds_make_of_a_stage() -> None:
    rule = {"name": "diloco", "period": 3}
    quiet = simulate(run_of("redundant", rule=rule))
    assert_same_training(simulate(run_of("redundant", rule=rule, lost=(1, 3))), quiet)


def test_a_copy_may_be_larger_than_the_largest_packet() -> None:
    """Parameters, a running mean, anchor and momentum: four vectors, and a packet holds two and a megabyte."""
    fields: dict[str, Any] = {"task": named(Chain, width=400), "rule": {"name": "diloco", "period": 3}}
    fields["inner"] = {"name": "sgd", "lr": 0.05, "momentum": 0.9}
    outcome = simulate(run_of("redundant", lost=(1,), **fields))
    assert rebuilt(outcome) == [(1, (0,))]
    assert 4 * 4 * outcome.params[1].numel() > largest_packet(outcome.params[1].numel())
    quiet = simulate(run_of("redundant", **fields)).merged()
    assert torch.allclose(outcome.merged(), quiet, rtol=0, atol=1e-5)  # products so large are rounded by where they lie


def test_who_sends_more_than_anybody_takes_hears_of_it() -> None:
    run = run_of("checkfree", rule=Flood(), pipeline={}, task=named(Chain, width=4), steps=2)
    with pytest.raises(ValueError, match=r"'flood', all: a packet of 2000000 bytes, and nobody takes more than 10"):
        simulate(run)


@pytest.mark.parametrize("victim", range(STAGES))
def test_a_stage_comes_back_with_its_mirrors_blocks_and_with_embedding_and_head_to_the_bit(victim: int) -> None:
    mirror = (1, 0, 3, 2)[victim]
    quiet = seen_undisturbed("checkfree_plus")
    outcome, begun, _ = noted(run_of("checkfree_plus", lost=(victim,)))
    assert rebuilt(outcome) == [(victim, (mirror,))]
    assert steps_done(outcome) == {STEPS}
    ((_, step, params),) = [each for each in begun if each[0] == victim][1:]
    assert step > 2
    run = run_of("checkfree_plus")
    cut = run.pipeline.cut(run.make_task(), run.seed, run.batch_size)
    for block, start, stop in cut.places(victim):
        if block in cut.trunk:
            place = cut.counterpart(block, victim, mirror)
            assert place is not None
            assert params[start:stop].equal(quiet[mirror, step][place : place + stop - start])
        else:
            assert params[start:stop].equal(quiet[victim, step][start:stop])


def test_a_stage_that_begins_anew_has_what_the_run_began_with() -> None:
    _, first, _ = noted(run_of("from_start"))
    outcome, begun, _ = noted(run_of("from_start", lost=(2,)))
    assert rebuilt(outcome) == [(2, ())]
    ((_, step, params),) = [each for each in begun if each[0] == 2][1:]
    assert step > 2
    assert params.equal(next(values for worker, _, values in first if worker == 2))
    assert BELIEVED[-1] == 0  # it corrects for its bias as in a first step


@pytest.mark.parametrize(
    ("recovery", "message"),
    [
        (
            "redundant",
            "stage 3 of its replica is lost and so is stage 2, which kept a copy for it",
        ),
        ("checkfree_plus", "stage 3 of its replica is lost and so are those beside it"),
    ],
)
def test_a_copy_is_lost_with_whoever_keeps_it(recovery: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(run_of(recovery, lost=(2, 3)))


def test_whoever_comes_back_keeps_copies_again() -> None:
    """Stage 0 is lost when stage 1, which keeps a copy for it, has been lost and is back."""
    quiet, run = undisturbed("redundant"), run_of("redundant", lost=(0,))
    events = [*run.fleet.events]
    later = run_of("redundant", lost=(3,), crash_s=2.3).fleet.events
    fleet = run.fleet.model_copy(update={"events": (later[0], later[1].model_copy(update={"at_s": 3.0}), *events)})
    outcome = simulate(run.model_copy(update={"fleet": fleet}))
    assert rebuilt(outcome) == [(3, (2,)), (0, (3,))]
    assert_same_training(outcome, quiet)


def test_of_equal_mirrors_swapped_and_plain_microbatches_come_to_the_same() -> None:
    """The loss of the first step, before anything has been learned, is that of the uncut model if W1 = W2, W3 = W4."""
    task = named(Mirrored, layers=STAGES)

    def first_losses(**pipeline: Any) -> list[float]:
        run = run_of("checkfree", task=task, steps=1, pipeline={"stages": STAGES, "microbatches": 2, **pipeline})
        return [each.loss for each in simulate(run).records if isinstance(each, Trained) and each.loss is not None]

    (plain,), swapped = first_losses(), first_losses(paths="swapped")
    assert len(swapped) == 2  # one microbatch ends at stage 3, the other at stage 2
    assert sum(swapped) / 2 == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("recovery", ["redundant", "checkfree_plus"])
def test_both_worlds_come_to_the_same_bits_and_bytes(recovery: str) -> None:
    run = run_of(recovery, steps=10)
    assert_same_replicas(train_here(run), simulate(run))


@pytest.mark.parametrize("victim", [0, 1, 3])
def test_over_sockets_copies_are_to_the_bit_too(victim: int) -> None:
    run = run_of("redundant").model_copy(update={"rule": breaking("local_sgd", {victim: 67})})
    outcome = train_here(run, lives=2)
    assert rebuilt(outcome) == [(victim, ((victim - 1) % STAGES,))]
    assert {record.reason for record in outcome.records if isinstance(record, Left)} == {"crashed", "finished"}
    assert_same_training(outcome, undisturbed("redundant"))


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        ({"recovery": "checkfree_plus", "paths": "straight"}, "'checkfree_plus' needs stages that have learned"),
        ({"recovery": "checkfree_plus", "stages": 2}, "'swapped' swaps two pairs of stages, and there are 2; take 4"),
        ({"recovery": "checkfree_plus", "microbatches": 1}, "take 2 microbatches at least"),
    ],
)
def test_what_cannot_be_mirrored_is_refused(pipeline: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of("checkfree", pipeline={"stages": STAGES, "microbatches": 4, **pipeline})


def test_stages_that_cannot_be_alike_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 blocks of the model are alike, which 4 stages cannot share equally"):
        simulate(run_of("checkfree_plus", task={**GPT, "depth": 5}))
    pipeline = {"stages": STAGES, "microbatches": 4, "recovery": "checkfree_plus", "cuts": (2, 4, 5)}
    with pytest.raises(ConfigError, match="stage 3 has none of the model's blocks 1 to 4, which are alike"):
        simulate(run_of("checkfree", pipeline=pipeline))


def test_with_an_odd_number_of_microbatches_the_smaller_half_is_swapped() -> None:
    pipeline = {"stages": STAGES, "microbatches": 3, "recovery": "checkfree_plus"}
    assert steps_done(simulate(run_of("checkfree", pipeline=pipeline, batch_size=6))) == {STEPS}
