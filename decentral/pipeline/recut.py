"""States of other stages: what a stage begins with when the model is cut anew, or was not cut before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from decentral.checkpoint import Description, Span
from decentral.errors import ConfigError, RunError
from decentral.grid import Grid
from decentral.protocols.rounds import NORMS
from decentral.snapshot import BUFFER, INNER, PARAMS, SLOT, Life, Snapshot
from decentral.state import Layout


class Move(NamedTuple):
    """Elements `start .. stop - 1` of an old stage's flat vector, which lie from `to` on in a new stage's."""

    stage: int
    start: int
    stop: int
    to: int


def moves(old: Sequence[Layout], new: Layout) -> list[Move]:
    """Return which elements of the old stages' vectors make the new stage's, in the order in which they lie there.

    Parameters are known by their names. Raises `ConfigError` if the old stages have not all of them, in these shapes.
    """
    places = {entry.name: (stage, entry) for stage, layout in enumerate(old) for entry in layout.entries}
    found: list[Move] = []
    for entry in new.entries:
        stage, was = places.get(entry.name, (0, None))
        if was is None or was.shape != entry.shape:
            had = "not in it" if was is None else f"of shape {was.shape} there"
            raise ConfigError(
                f"checkpoint.url: the checkpoint is of another model: '{entry.name}' of shape {entry.shape} is {had}"
            )
        if found and found[-1].stage == stage and found[-1].stop == was.start:
            found[-1] = found[-1]._replace(stop=was.stop)
        else:
            found.append(Move(stage, was.start, was.stop, entry.start))
    return found


Load = Callable[[Collection[str], Sequence[Span]], Mapping[str, Tensor]]
"""Returns vectors made of these spans of the workers' tensors of these names, one for each name."""


class Assembly(NamedTuple):
    """What a new stage begins with: vectors of these `names`, each made of the `spans`, and whole `buffers`.

    These are given by name, each with the span that it is and its shape; `bare` has no tensors yet.
    """

    names: tuple[str, ...]
    spans: tuple[Span, ...]
    buffers: Mapping[str, tuple[Span, tuple[int, ...]]]
    bare: Snapshot

    def parts(self, worker: int) -> Iterator[tuple[str, Span]]:
        """Yield the names and spans of what is the worker's."""
        for name in self.names:
            yield from ((name, span) for span in self.spans if span.worker == worker)
        yield from ((name, span) for name, (span, _) in self.buffers.items() if span.worker == worker)

    def nbytes(self, worker: int, tensors: Description) -> int:
        """Return how many bytes of it are the worker's, which has these tensors."""
        widths = {held.name: held.nbytes // max(1, held.numel) for held in tensors.tensors}
        return sum(widths[name] * (span.stop - span.start) for name, span in self.parts(worker))

    def given_by(self, worker: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the worker gives of its tensors, as `joined` takes it."""
        return {_key(name, span): tensors[name].view(-1)[span.start : span.stop] for name, span in self.parts(worker)}

    def joined(self, given: Mapping[str, Tensor]) -> Snapshot:
        """Return what the stage begins with, of what all workers give. Raises `KeyError` if something is missing."""
        return self.loaded(
            lambda names, spans: {name: torch.cat([given[_key(name, span)] for span in spans]) for name in names}
        )

    def loaded(self, load: Load) -> Snapshot:
        """Return what the stage begins with; raises as `load` does."""
        tensors = dict(load(self.names, self.spans))
        for name, (span, shape) in self.buffers.items():
            tensors[name] = load([name], [span])[name].view(shape)
        return replace(self.bare, tensors=tensors)


def _key(name: str, span: Span) -> str:
    return f"{span.to} {name}"


class OldStages(NamedTuple):
    """A run's stages before: how the parameters of each lie in its flat vector, and what each worker there holds."""

    layouts: Sequence[Layout]
    workers: Mapping[int, Description]

    def vectors(self) -> list[str]:
        """Return the names of the tensors that have an element for each parameter, and are cut as these are.

        Raises `ConfigError` if a worker keeps anything else that cannot be cut. How large contributions usually are is
        not kept: every rule learns that anew within a few rounds.
        """
        grid, common = Grid(len(self.layouts)), dict[str, int]()
        for worker, described in sorted(self.workers.items()):
            size = self.layouts[grid.stage(worker)].size
            for held in described.tensors:
                if held.name.startswith(BUFFER) or held.name.endswith(f".{NORMS}"):
                    continue
                if held.shape != (size,):
                    raise ConfigError(
                        f"pipeline: stages cannot be cut anew, for worker {worker} keeps '{_said(held.name)}' of shape "
                        f"{held.shape}, which has no element for each of the {size} parameters; go on with the stages "
                        "that the run had"
                    )
                common[held.name] = common.get(held.name, 0) + 1
        for name, workers in common.items():
            if workers < len(self.workers):
                raise ConfigError(
                    f"pipeline: stages cannot be cut anew, for only {workers} of {len(self.workers)} workers keep "
                    f"'{_said(name)}'; go on with the stages that the run had"
                )
        return list(common)

    def assembly(self, replica: int, layout: Layout, buffers: Collection[str]) -> Assembly:
        """Return what a stage with that layout, and with these buffers of the model, begins with in a replica.

        Of each old stage the replica's own worker gives what it had, or one of another replica what a newcomer gets:
        nothing that the stage does not hold. Raises as `vectors`, and `RunError` if an old stage is missing.
        """
        plan, sources = moves(self.layouts, layout), self._sources(replica)
        spans = [Span(sources[move.stage], *move[1:]) for move in plan]
        described = [self.workers[span.worker] for span in spans]
        goes_on = all(Grid(len(sources)).replica(worker) == replica for worker in sources)
        own = {name for each in described for name in each.life.own_slots}
        names = [name for name in self.vectors() if goes_on or name.removeprefix(SLOT) not in own]
        holders = {held.name: (worker, held) for worker in sources for held in self.workers[worker].tensors}
        whole = {}
        for name in sorted({BUFFER + each for each in buffers} & holders.keys()):
            worker, held = holders[name]
            whole[name] = Span(worker, 0, held.numel, 0), held.shape
        rounds: dict[str, int] = {}
        for each in described:  # of channels that all have, they have settled as many
            rounds.update(each.rounds)
        life = self._life(sources[0], described, names) if goes_on else None
        return Assembly(tuple(names), tuple(spans), whole, Snapshot(described[0].step, rounds, {}, life))

    def _sources(self, replica: int) -> list[int]:
        """Return the worker that gives a replica its part of each old stage."""
        grid, sources = Grid(len(self.layouts)), []
        for stage in range(grid.stages):
            holders = sorted(worker for worker in self.workers if grid.stage(worker) == stage)
            if not holders:
                raise RunError(f"pipeline: of those who were there nobody has stage {stage}; there is no way to go on")
            worker = grid.worker(replica, stage)
            sources.append(worker if worker in holders else holders[replica % len(holders)])
        return sources

    def _life(self, first: int, described: Sequence[Description], names: Collection[str]) -> Life:
        """Return how far the replica was; the journal's records and the accounts begin anew with the new stages.

        A stage that was rebuilt has done fewer inner steps than others. Of the old stages that come together the fewest
        count, as the optimiser's corrections for a short past go by them: no block takes longer steps than before.
        """
        life = self.workers[first].life
        own = {name for each in described for name in each.life.own_slots if SLOT + name in names}
        return Life(
            time_s=max(each.life.time_s for each in self.workers.values()),
            samples=life.samples,
            records=0,
            inner_steps=min(each.life.inner_steps for each in described),
            next_evaluation=life.next_evaluation,
            evaluated=life.evaluated,
            own_slots=tuple(sorted(own)),
            seconds=dict.fromkeys(life.seconds, 0.0),
            sent_bytes=0,
            received_bytes=0,
            messages_sent=0,
        )


def _said(name: str) -> str:
    """Return what a tensor of a snapshot is called in messages."""
    return name if name == PARAMS else name.removeprefix(SLOT).removeprefix(INNER)
