"""What a training loop calls after each of its steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from decentral.embedded.copies import Copy
from decentral.embedded.gate import Answer, End, Gate, Look, Train
from decentral.embedded.losses import Losses
from decentral.embedded.site import Site
from decentral.errors import RunError

TRAIN, LOOK, ADOPT, STOP, FAIL = range(5)
"""What all ranks of a site are told to do. With the last three the run is over: with what the rule has left in the
copy, with what the model has, with an error."""
UNTOLD = -1


class _Word(NamedTuple):
    """An order in numbers: TRAIN from which step, how many, and how many the optimiser has done; LOOK at which mean."""

    kind: int
    first: int = 0
    second: int = 0
    third: int = UNTOLD


class Sync:
    """The loop's side of a rule: it counts steps, and hands the parameters over when a phase is done."""

    def __init__(self, copy: Copy, site: Site, gate: Gate) -> None:
        self._copy, self._site, self._gate = copy, site, gate
        self._order: Train | Look | None = None  # that has no answer yet
        self._began = self._done = self._ordered = 0  # of this phase: its first step, steps done and to do
        self._until = 0  # steps of this phase that need no look at the gate
        self._losses = Losses()
        self._failure: BaseException | None = None
        self._closing = self._is_over = False

    @property
    def steps(self) -> int:
        """Local steps that this replica has done; who came later counts those of the worker that let it in."""
        return self._began + self._done

    def step(self, loss: Tensor | float | None = None) -> bool:
        """Count a local step, as the last thing that the loop does in it; return False when the run is over.

        The `loss` of the step, one number, is for the journal alone, which has the mean of each phase of the rule; of
        ranks that share a replica it has the first one's.

        It is over when the run file's `steps` are done, or when a notice that the machine goes was heeded. Where a
        phase of the rule ends this waits for its round; then model and optimiser have what the rule has made of them.
        Raises what the rule has raised, `RunError` when this worker is out of the run, and `ConfigError` for a loss
        of several numbers.
        """
        self._done += 1
        if loss is not None:
            self._losses.add(loss)
        if self._done < self._until:
            return True
        return self._hand_over()

    def begin(self) -> bool:
        """Wait until the run begins, or has let this worker in. As `step`."""
        return self._obey()

    def close(self) -> None:
        """The loop does no more steps: see to its end what is under way. Raises as `step` does."""
        self._closing = True
        self._hand_over()

    def abandon(self) -> None:
        """The loop has failed; model and optimiser are left as they are."""
        self._is_over = True
        self._gate.close()
        self._answer(Answer())

    def interrupt(self) -> None:
        """Have the next step look at the gate, in the midst of a phase. Called from any thread.

        Not in a site of several ranks, which must look at the same step.
        """
        if self._site.size == 1:
            self._until = 0

    def _hand_over(self) -> bool:
        if self._is_over:
            return False
        self._copy.gather()
        self._answer(Answer(self._done, self._losses.take()))
        return self._obey()

    def _obey(self) -> bool:
        """Do what is ordered, up to local steps (return True) or the end."""
        while True:
            word = _Word(*self._site.same(self._next() if self._site.speaks else _Word(STOP)))
            if word.kind == LOOK:
                self._copy.look(self._copy.names[word.first])
                self._answer(Answer())
                continue
            if word.kind in (TRAIN, ADOPT):
                self._copy.scatter()
            if word.kind != TRAIN:
                return self._end(word.kind == FAIL)
            if word.third != UNTOLD:
                self._copy.set_inner_steps(word.third)
            self._began, self._done, self._ordered = word.first, 0, word.second
            self._until = word.second
            if self._gate.ended:
                self.interrupt()
            return True

    def _next(self) -> _Word:
        order = self._gate.take()
        if isinstance(order, End):
            self._failure = order.error
            if order.error is not None:
                return _Word(FAIL)
            return _Word(STOP if self._done < self._ordered and not self._closing else ADOPT)
        self._order = order
        if isinstance(order, Look):
            return _Word(LOOK, self._copy.names.index(order.name))
        return _Word(TRAIN, order.step, order.steps, UNTOLD if order.inner_steps is None else order.inner_steps)

    def _answer(self, answer: Answer) -> None:
        order, self._order = self._order, None
        if order is not None:
            order.answer.set_result(answer)

    def _end(self, failed: bool) -> bool:
        self._is_over, self._until = True, 0
        self._began, self._done, self._ordered = self.steps, 0, 0
        self._gate.close()
        if self._failure is not None:
            raise self._failure
        if failed:
            raise RunError("this site's first rank is out of the run; its error says why")
        return False
