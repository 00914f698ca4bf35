"""A run whose model is cut anew at a checkpoint comes to where an undisturbed one does, rule and optimiser included."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
from blocks import Chain
from lives import Lives, live
from shelf import OWNER, snapshot, written
from torch import Tensor, nn

from decentral.checkpoint import (
    Archive,
    Description,
    Desk,
    Found,
    Storage,
    keep,
    load_spans,
    make_checkpoint,
    newest,
    part,
)
from decentral.checkpoint.manifest import CHUNK
from decentral.config import Run, validated
from decentral.errors import ConfigError, RunError
from decentral.journal import Evaluated, Left, Record, Trained
from decentral.peer import Peer
from decentral.pipeline import OldStages, Pipeline
from decentral.sim.engine import computed
from decentral.snapshot import Snapshot
from decentral.state import Layout
from decentral.verify import verify
from decentral.workers.resume import cut_anew, find_checkpoint, go_on_from, state_of

NUMBERS = count()
STEPS, REPLICAS = 24, 2
ROUNDING = 1e-5  # of a pipeline against the uncut model, see docs/pipelines.md


class Matrices(Chain):
    """A chain of square matrices."""

    def model(self) -> nn.Module:
        return nn.Sequential(*[nn.Linear(self.width, self.width, bias=False) for _ in range(self.layers)])


def run_of(stages: int, url: str = "", **fields: Any) -> Run:
    pipeline = {"stages": stages, "microbatches": 2} if stages > 1 else {}
    return validated(
        {
            "steps": STEPS,
            "batch_size": 4,
            "evaluate_every": 6,
            "task": {"name": "blocks:Chain", "layers": 6},
            "rule": {"name": "diloco", "period": 3},
            "inner": {"name": "adamw", "lr": 3e-3, "clip_norm": 0.5},
            "fleet": {"workers": [{"count": stages * REPLICAS}]},
            "checkpoint": {"url": url},
            **fields,
            "pipeline": pipeline | fields.get("pipeline", {}),
        },
        "test",
    )


def memory() -> str:
    return f"memory://other-stages/{next(NUMBERS)}"


async def here(work: Any) -> Any:
    return work()


def checkpointed(run: Run) -> Lives:
    """Return the run, undisturbed; a third of its way is in its storage."""
    storage = Storage(run.checkpoint.url)

    async def beside(peers: dict[int, Peer]) -> None:
        desk, archive = Desk(), Archive(storage, "a1b2", keep=2)
        archive.claim(resume=False)
        for peer in peers.values():
            peer.spawn(keep(peer, desk, storage, here))
        while any(peer.step < STEPS // 3 for peer in peers.values()):
            await asyncio.sleep(0.01)
        await make_checkpoint(desk, archive, list(peers), here, run=run.to_table(), timeout_s=100)

    return live(run, beside=beside)


def states(run: Run, folder: str) -> dict[int, Snapshot]:
    """Return what each worker of the run begins with."""
    with computed(run, run.make_task()) as replicas:
        return {worker: state_of(run, folder, worker, replica) for worker, replica in enumerate(replicas)}


def went_on(run: Run, quiet: Lives) -> tuple[list[Record], Lives]:
    """Return the journal before the checkpoint that `quiet` has left, and how `run` went on from there."""
    resumption = find_checkpoint(run, quiet.records)
    return list(resumption.records), live(run, restored=states(run, resumption.folder))


def by_name(run: Run, lives: Lives, replica: int) -> dict[str, dict[str, Tensor]]:
    """Return what a replica's workers hold at the end, a tensor for each parameter under its name."""
    layouts = run.pipeline.layouts(run.make_task(), run.seed, run.batch_size)
    found: dict[str, dict[str, Tensor]] = {}
    for stage, layout in enumerate(layouts):
        tensors = lives.peers[run.pipeline.grid.worker(replica, stage)].whole_snapshot().tensors
        for name, values in tensors.items():
            if values.shape == (layout.size,):
                found.setdefault(name, {}).update(
                    {entry.name: values[entry.start : entry.stop] for entry in layout.entries}
                )
    return found


def assert_same_end(old: Run, new: Run, quiet: Lives, again: Lives) -> None:
    """Assert that every tensor that goes with the parameters is the same under every name, up to rounding."""
    for replica in range(REPLICAS):
        expected, found = by_name(old, quiet, replica), by_name(new, again, replica)
        assert found.keys() == expected.keys()
        for name, parameters in expected.items():
            assert found[name].keys() == parameters.keys()
            for parameter, values in parameters.items():
                assert torch.allclose(found[name][parameter], values, rtol=0, atol=ROUNDING), (name, parameter)


@pytest.mark.parametrize(("before", "after"), [(4, 3), (4, 2), (2, 4), (3, 1), (1, 3)])
def test_the_same_end_and_the_same_samples_with_other_stages(before: int, after: int) -> None:
    url = memory()
    old, new = run_of(before, url), run_of(after, url)
    quiet = checkpointed(old)
    journal, again = went_on(new, quiet)
    assert by_name(new, again, 0).keys() == {
        *("params", "inner exp_avg", "inner exp_avg_sq", "slot anchor", "slot momentum")
    }
    assert_same_end(old, new, quiet, again)
    left = [record for record in journal if isinstance(record, Left)]
    assert [(record.worker, record.reason) for record in left] == [
        (worker, f"cut anew, {before} to {after} stages") for worker in range(before * REPLICAS)
    ]
    journal += again.records
    verify(journal)
    assert_samples_once(journal, quiet)


@pytest.mark.parametrize(("before", "after"), [(4, 3), (2, 4), (3, 1)])
def test_who_leaves_with_its_state_gives_of_it_what_other_stages_need(before: int, after: int) -> None:
    """Nothing is written: all leave at one point, and the run goes on there with other stages."""
    old, new = run_of(before), run_of(after)
    described: dict[int, Description] = {}

    async def beside(peers: dict[int, Peer]) -> None:
        desk, storage = Desk(), Storage(memory())
        for peer in peers.values():
            peer.spawn(keep(peer, desk, storage, here))
        while any(peer.step < STEPS // 3 for peer in peers.values()):
            await asyncio.sleep(0.01)
        described.update(await part(desk, list(peers), cut_anew(before, after), timeout_s=100))

    quiet, parted = live(old), live(old, beside=beside)
    assert {left.reason for left in parted.records if isinstance(left, Left)} == {cut_anew(before, after)}
    task, grid = new.make_task(), new.pipeline.grid
    layouts = new.pipeline.layouts(task, 0, new.batch_size)
    stages, begin = OldStages(old.pipeline.layouts(task, 0, old.batch_size), described), {}
    for worker in range(new.fleet.size):
        need, given = stages.assembly(grid.replica(worker), layouts[grid.stage(worker)], ()), dict[str, Tensor]()
        for peer in parted.peers.values():
            assert peer.held is not None
            given |= need.given_by(peer.id, peer.held.tensors)
        begin[worker] = need.joined(given)
    again = live(new, restored=begin)
    assert_same_end(old, new, quiet, again)
    lines = {worker: each.life.records for worker, each in described.items()}
    journal = [*go_on_from(new, described, lines, before, parted.records).records, *again.records]
    verify(journal)
    assert_samples_once(journal, quiet)


def assert_samples_once(journal: list[Record], quiet: Lives) -> None:
    """Assert that each local step has been done as often, on as many samples, and evaluated after the same ones."""

    def told(records: list[Record]) -> tuple[Counter[int], list[int]]:
        steps = Counter[int]()
        for record in records:
            if isinstance(record, Trained) and record.samples:
                each = record.samples // record.steps
                steps.update(dict.fromkeys(range(record.step - record.steps, record.step), each))
        return steps, [record.step for record in records if isinstance(record, Evaluated)]

    assert told(journal) == told(quiet.records)
    assert told(journal)[0] == Counter(dict.fromkeys(range(STEPS), 4 * REPLICAS))


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("ddp", {"stages": 2, "cuts": [8]}, {"stages": 2, "cuts": [2]}),
        ({"name": "local_sgd", "period": 3}, {"stages": 3, "head": "first"}, {"stages": 2, "head": "last"}),
        ({"name": "noloco", "period": 3}, {"stages": 3}, {"stages": 2}),
        ({"name": "diloco", "period": 3, "codec": {"name": "error_feedback", "codec": "int8"}}, {"stages": 2}, {}),
    ],
    ids=["other cuts", "another head", "gossip", "what a codec has left unsent"],
)
def test_whatever_goes_with_the_parameters_is_cut_as_they_are(rule: Any, before: Any, after: Any) -> None:
    url = memory()
    old = run_of(before["stages"], url, rule=rule, pipeline=before)
    new = run_of(after.get("stages", 1), url, rule=rule, pipeline=after)
    quiet = checkpointed(old)
    _, again = went_on(new, quiet)
    if "codec" in rule:  # coded in other blocks: as good, and not the same
        assert "slot sync.0.residual" in by_name(new, again, 0)
        snapshots = states(new, find_checkpoint(new, quiet.records).folder)
        assert all(snapshot.life.own_slots == ("sync.0.residual",) for snapshot in snapshots.values() if snapshot.life)
    else:
        assert_same_end(old, new, quiet, again)


def test_replicas_that_were_not_there_begin_where_another_is() -> None:
    """Whole again, with more replicas than before; and of stages that stay as they are, the one that is needed."""
    url = memory()
    quiet = checkpointed(run_of(2, url))
    for stages, replicas in ((1, 3), (2, 3)):
        more = run_of(stages, url, fleet={"workers": [{"count": stages * replicas}]})
        snapshots = states(more, find_checkpoint(more, quiet.records).folder)
        for stage in range(stages):
            first, *others = [snapshots[stage + stages * replica] for replica in range(replicas)]
            assert first.life is not None
            assert others[1].life is None
            assert others[1].tensors["params"].equal(first.tensors["params"])  # which are equal after a round


def test_what_a_rule_remembers_of_whole_stages_is_refused_before_anybody_begins() -> None:
    rule, url = {"name": "sgp", "period": 3}, memory()
    quiet = checkpointed(run_of(2, url, rule=rule))
    with pytest.raises(ConfigError, match=r"under rule 'sgp' workers remember the mass .* cannot be cut anew"):
        find_checkpoint(run_of(1, url, rule=rule), quiet.records)


def found_of(snapshots: dict[int, Snapshot], storage: Storage) -> Found:
    """Return a checkpoint of these."""
    Archive(storage, OWNER, keep=2).claim(resume=False)
    written(storage, snapshots)
    found = newest(storage)
    assert found is not None
    return found


def stage_of(storage: Storage, found: Found, old: Sequence[Layout], new: Layout) -> Snapshot:
    """Return what a stage begins with that lies so, in the first replica."""
    return OldStages(old, found.manifest.workers).assembly(0, new, ()).loaded(partial(load_spans, storage, found))


def test_the_inner_optimisers_corrections_go_by_the_stage_that_was_rebuilt_last() -> None:
    task, storage = Chain(layers=6), Storage(memory())
    old = Pipeline(stages=2).layouts(task, 0, 4)
    snapshots = {stage: snapshot(8, params=torch.zeros(layout.size)) for stage, layout in enumerate(old)}
    life = snapshots[1].life
    assert life is not None
    snapshots[1] = replace(snapshots[1], life=replace(life, inner_steps=3))
    found = found_of(snapshots, storage)

    def steps(stages: int) -> list[int | None]:
        layouts = Pipeline(stages=stages).layouts(task, 0, 4)
        states = [stage_of(storage, found, old, each) for each in layouts]
        return [state.life and state.life.inner_steps for state in states]

    assert (steps(1), steps(3)) == ([3], [8, 3, 3])


def test_a_checkpoint_in_which_nobody_has_a_stage_says_which() -> None:
    old, storage = Pipeline(stages=3).layouts(Chain(), 0, 4), Storage(memory())
    found = found_of({stage: snapshot(8, params=torch.zeros(old[stage].size)) for stage in (0, 2)}, storage)
    (whole,) = Pipeline().layouts(Chain(), 0, 4)
    with pytest.raises(RunError, match=r"pipeline: of those who were there nobody has stage 1; there is no way"):
        OldStages(old, found.manifest.workers).assembly(0, whole, ())


class Counted(Storage):
    """Counts the bytes that are read of workers' files, less their headers."""

    nbytes = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        data = super().read(name, start, stop)
        self.nbytes += len(data) if start else 0
        return data


@pytest.mark.parametrize(("before", "after"), [(4, 3), (2, 4), (4, 1), (1, 4)])
def test_every_chunk_is_read_by_whom_it_belongs_to_and_nobody_else(before: int, after: int) -> None:
    """Layers as long as a chunk: over all workers, the state is read once."""
    task, layers, url = Matrices(width=1024, layers=4), 4, memory()
    old, new = (Pipeline(stages=stages).layouts(task, 0, 4) for stages in (before, after))
    whole = {"params": torch.randn(layers * 1024**2), "inner exp_avg": torch.randn(layers * 1024**2)}
    snapshots, place = {}, 0
    for stage, layout in enumerate(old):
        snapshots[stage] = snapshot(8, **{name: each[place : place + layout.size] for name, each in whole.items()})
        place += layout.size
    storage = Counted(url)
    found = found_of(snapshots, storage)
    read, parts = [], []
    for layout in new:
        storage.nbytes = 0
        parts.append(stage_of(storage, found, old, layout).tensors)
        read.append(storage.nbytes)
    assert read == [2 * 4 * layout.size for layout in new]
    assert sum(read) == 2 * layers * CHUNK
    for name, values in whole.items():
        assert torch.cat([part[name] for part in parts]).equal(values)
