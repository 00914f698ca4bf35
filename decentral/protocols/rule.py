"""`SyncRule`: the base of every rule."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from decentral.errors import ConfigError
from decentral.naming import Kind
from decentral.peer import Peer
from decentral.protocols.schedule import EQUAL, MatchedRandom, Planned, Schedule
from decentral.state import Layout

if TYPE_CHECKING:
    from decentral.protocols.exchanges import Exchanges
    from decentral.protocols.reductions import Reductions

Newcomers = Literal["none", "at once", "follow"]


class SyncRule(Kind):
    """How workers train together. Its fields are its hyper-parameters; what it remembers lives in the peer's slots.

    Subclass it, write `run` against `Peer`, and name it in the run file as `module:Class`. The same object drives every
    worker, in both worlds.
    """

    called = "rule"
    built_in: ClassVar[dict[str, type[SyncRule]]] = {}

    newcomers: ClassVar[Newcomers] = "none"
    """Whether a worker may come into a run that has begun, with another's state: "follow" in rules that vote on their
    rounds, which it hears until it takes part; "at once" in rules that need no vote; "none" if it cannot."""

    unaccountable: ClassVar[str] = ""
    """Why nobody could say which samples the rule has consumed, so that they cannot be leased; empty: they can."""

    rests: ClassVar[bool] = False
    """Whether all workers stand, now and then, between the same two rounds with nothing on its way: a checkpoint takes
    them there, and the rule goes on from it to the same bits."""

    needs_whole_model: ClassVar[str] = ""
    """Why each worker must have the whole model; empty: it may have a stage, and talk with those who have that too."""

    needs_task: ClassVar[str] = ""
    """Why a worker must compute more than local steps for the rule, so that it cannot run beside a training loop of the
    user's own (`decentral.join`); empty: it counts that loop's steps, and changes parameters between them."""

    other_memory: ClassVar[str] = ""
    """What the rule remembers that has no element for each parameter, so that it cannot be cut as these are when a
    model is cut into other stages; empty: nothing."""

    common_steps: ClassVar[bool] = False
    """Whether the inner optimiser takes the same steps on all workers, so that its state is everybody's."""

    @abstractmethod
    async def run(self, peer: Peer) -> None:
        """Drive one worker until `peer.train` (or `peer.backward`) says that the budget is spent."""

    def check(self, workers: int) -> None:
        """Refuse, with `ConfigError`, what this rule cannot do with so many workers. Called when a run file is read."""

    @property
    def vectors(self) -> int:
        """How many vectors of the model's size the rule's longest packet holds."""
        return 1

    @property
    def takes_newcomers(self) -> bool:
        """Whether a worker may come into a run that has begun."""
        try:
            self.check_newcomers()
        except ConfigError:
            return False
        return True

    @property
    def takes_unequal_phases(self) -> bool:
        """Whether workers may do unequal numbers of local steps between two rounds: `period` takes any schedule."""
        field = type(self).model_fields.get("period")
        return field is not None and EQUAL not in field.metadata and isinstance(getattr(self, "period", None), Schedule)

    def check_newcomers(self) -> None:
        """Refuse, with `ConfigError`, a fleet to which workers come after the start, if the rule cannot take them."""
        if self.newcomers == "none":
            raise ConfigError(
                f"rule: '{self.spelling()}' cannot take a worker into a run that has begun, and this fleet brings some "
                "(fleet.churn, start_s of a group, or a 'join' event); take them out, or a rule that can, such as "
                "'diloco', 'streaming_diloco', 'noloco', 'gossip' or 'ddp'"
            )

    def check_leases(self, bounded: bool) -> None:
        """Refuse, with `ConfigError`, a stream of samples that all share (and that ends, if `bounded`)."""
        if self.unaccountable:
            raise ConfigError(
                f"leases: under rule '{self.spelling()}' {self.unaccountable}, so nobody could say which samples were "
                "consumed; leave leases out, or take another rule, such as 'diloco', 'ddp' or 'noloco'"
            )
        period = getattr(self, "period", None)
        if bounded and isinstance(period, Schedule) and not period.equal:
            raise ConfigError(
                "epochs: when the samples are used up all workers end at the same local step, and "
                f"'{period.spelling()}' fits steps to each one's speed; give steps in place of epochs, or a period of "
                "equal phases"
            )

    def check_checkpoints(self) -> None:
        """Refuse, with `ConfigError`, checkpoints of a run whose workers are never at rest together."""
        if not self.rests:
            raise ConfigError(
                f"checkpoint.url: under rule '{self.spelling()}' workers are never at rest together, so there are no "
                "checkpoints; leave the URL out, or take another rule, such as 'diloco', 'ddp', 'noloco' or 'gossip'"
            )

    def check_parity(self) -> None:
        """Refuse, with `ConfigError`, parity where nobody could get its own state back, or has none."""
        reason = ""
        if not self.rests:
            reason = "workers are never at rest together"
        elif not self.takes_newcomers:
            reason = "nobody who is lost can come back"
        elif self.common_steps:
            reason = "the inner optimiser takes the same steps everywhere, so whoever comes back has its host's"
        if reason:
            raise ConfigError(
                f"parity.workers: under rule '{self.spelling()}' {reason}; leave it out, or take another rule, such as "
                "'diloco', 'local_sgd', 'noloco' or 'gossip'"
            )

    def check_stages(self) -> None:
        """Refuse, with `ConfigError`, models that are cut into stages, if a worker needs the whole one for the rule."""
        if self.needs_whole_model:
            raise ConfigError(
                f"pipeline.stages: under rule '{self.spelling()}' {self.needs_whole_model}; take whole models "
                "(stages = 1), or another rule, such as 'diloco', 'noloco' or 'ddp'"
            )
        period = getattr(self, "period", None)
        if isinstance(period, Schedule) and not period.equal:
            raise ConfigError(
                f"pipeline.stages: the stages of a replica take the same steps, and '{period.spelling()}' fits steps "
                "to each worker's speed; take a period of equal phases"
            )

    def check_own_loop(self, *, norms: bool, endless: bool) -> None:
        """Refuse, with `ConfigError`, to run beside a training loop of the user's own, if the rule cannot.

        `norms`: the model keeps running statistics of batch normalisation; `endless`: nobody knows how many steps the
        loop will do.
        """
        if self.needs_task:
            raise ConfigError(
                f"rule: '{self.spelling()}' cannot run beside a training loop of your own: {self.needs_task}; take a "
                "rule that counts local steps, such as 'diloco', 'streaming_diloco', 'local_sgd', 'noloco' or "
                "'gossip', or describe the model as a task for `decentral train`"
            )
        period = getattr(self, "period", None)
        if endless and isinstance(period, Planned | MatchedRandom):
            raise ConfigError(
                f"steps: missing; '{period.spelling()}' plans phases for all local steps: say how many there are, or "
                "take a period that is a number"
            )

    def check_other_stages(self) -> None:
        """Refuse, with `ConfigError`, models that are cut anew, if what the rule remembers cannot be cut with them."""
        if self.other_memory:
            raise ConfigError(
                f"pipeline: under rule '{self.spelling()}' workers remember {self.other_memory}, so stages cannot be "
                "cut anew; keep their number and leave pipeline.least out, or take another rule, such as 'diloco', "
                "'noloco' or 'ddp'"
            )

    def exchanges(self) -> Exchanges | None:
        """Return what all rounds are, if each is a local phase, one exchange and nothing else; None otherwise.

        A simulation without tensors then needs no messages. It is not asked of a class that only inherits it and has a
        `run` of its own.
        """
        return None

    def reductions(self) -> Reductions | None:
        """Return what all rounds are, if each is local work, one all-reduce and nothing else; as `exchanges`."""
        return None

    def check_layout(self, layout: Layout) -> None:
        """Refuse, with `ConfigError`, a model this rule cannot train. Called before the first step."""
