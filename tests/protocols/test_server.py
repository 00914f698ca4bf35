"""The server that asynchronous rules share: whose pushes count, how often, and who serves when somebody dies."""

from __future__ import annotations

import pytest
import torch
from cluster import all_equal, cluster, crash, rounds
from tally import Tally
from torch import Tensor

from decentral.journal import Left, Refused
from decentral.peer import Peer
from decentral.protocols.codecs import Float32, Int8
from decentral.protocols.hosting import GLOBALS, pull_channel, push_channel
from decentral.protocols.server import Server
from decentral.sim.simulate import simulate
from decentral.wire import Tag


def test_every_push_counts_once_and_all_end_with_the_servers_model() -> None:
    outcome = simulate(cluster(Tally(), steps=20, speeds=(1, 0.6, 0.3)))
    assert all_equal(outcome)
    assert outcome.params[0][:4].tolist() == [10, 10, 10, 0]


def test_the_servers_worker_stays_until_the_others_are_done() -> None:
    outcome = simulate(cluster(Tally(), steps=20, speeds=(1, 0.6, 0.2)))
    ended = {record.worker: record.time_s for record in outcome.records if isinstance(record, Left)}
    assert ended[0] >= 20 * 0.05 / 0.2
    assert [left.step for left in outcome.left()] == [20, 20, 20]


@pytest.mark.parametrize("at_s", [0.05, 0.31, 0.52, 0.87, 1.31])
def test_when_the_server_dies_the_next_member_serves_and_no_push_counts_twice(at_s: float) -> None:
    run = cluster(Tally(), steps=40, speeds=(1, 0.7, 0.4, 0.9), events=[crash(at_s, 0)], detection_s=0.4)
    outcome = simulate(run)
    counts = outcome.params[1][:4].tolist()
    assert all_equal(outcome)
    assert sorted(outcome.params) == [1, 2, 3]
    assert rounds(outcome, "server 1")
    assert all(count <= 20 for count in counts)
    # Lost: what the dead server had taken since worker 1 heard of it, and a push on its way from each.
    assert all(count >= 20 - (at_s + 0.4) / 0.1 - 2 for count in counts[1:])


def test_two_servers_may_die_one_after_the_other() -> None:
    events = [crash(0.5, 0), crash(1.5, 1)]
    outcome = simulate(cluster(Tally(), steps=40, speeds=(1, 0.7, 0.4, 0.9), events=events, detection_s=0.2))
    assert all_equal(outcome)
    assert sorted(outcome.params) == [2, 3]
    assert rounds(outcome, "server 2")


def test_staleness_is_the_updates_since_the_worker_was_sent_out() -> None:
    Tally.seen.clear()
    simulate(cluster(Tally(), steps=12, speeds=(1, 0.26), latency_s=0.001))
    assert [staleness for worker, staleness in Tally.seen if worker == 1][:1] == [3]
    assert all(staleness <= 1 for worker, staleness in Tally.seen if worker == 0)


class Cheat(Tally):
    """Worker 1 first sends what nobody can read, and later a push twice."""

    async def run(self, peer: Peer) -> None:
        await (self._cheat(peer) if peer.id == 1 else super().run(peer))

    async def _cheat(self, peer: Peer) -> None:
        up, down = push_channel("0", "1"), pull_channel("0", "1")
        unreadable, one = Int8().encode(peer.params), Float32().encode(torch.eye(16)[1])
        for number, packet in enumerate((unreadable, one, one), start=1):
            steps = await peer.train(self.period)
            packet.weight = steps * number + 1
            peer.send(0, Tag(up, number), packet)
            _, reply = await peer.recv(0, Tag(down, number))
            assert GLOBALS.decode(reply, peer.params)[1] == max(0, number - 1)
        peer.send(0, Tag(up, 3), one)
        await peer.train(peer.steps_left)


def test_what_cannot_be_read_and_what_comes_again_is_refused_and_costs_the_others_nothing() -> None:
    outcome = simulate(cluster(Cheat(), 3, 30))
    assert {record.code for record in outcome.records if isinstance(record, Refused)} == {"codec", "stale"}
    assert outcome.params[0][:4].tolist() == [15, 2, 15, 0]


class Loud(Tally):
    """From its third push on worker 2 says a million times as much."""

    async def work(self, peer: Peer, anchor: Tensor, assigned: int) -> Tensor | None:
        push = await super().work(peer, anchor, assigned)
        return push * 1e6 if push is not None and peer.id == 2 and peer.step > 2 * self.period else push


def test_a_push_of_absurd_length_is_refused_if_there_is_a_limit() -> None:
    run = cluster(Loud(), 3, 20)
    guarded, trusting = (simulate(run.model_copy(update={"norm_limit": limit})) for limit in (10.0, 0.0))
    assert guarded.params[0][:4].tolist() == [10, 10, 2, 0]
    assert {record.code for record in guarded.records if isinstance(record, Refused)} == {"norm"}
    assert trusting.params[0][2] == 8e6 + 2


class Failing(Tally):
    async def serve(self, server: Server) -> None:
        await server.push()
        raise ValueError("this server has a mistake")


def test_a_server_that_fails_fails_its_worker() -> None:
    with pytest.raises(ValueError, match="this server has a mistake"):
        simulate(cluster(Failing(), 2, 8, patience_s=5.0))
