"""A whole snapshot is a copy that stays as it is, and memory that is handed back is used again."""

from __future__ import annotations

from decentral.config import validated
from decentral.peer import Peer
from decentral.protocols import SyncRule
from decentral.sim.simulate import simulate


class Snapping(SyncRule):
    """Takes whole snapshots between local steps."""

    async def run(self, peer: Peer) -> None:
        await peer.train(1)
        first = peer.whole_snapshot()
        was = {name: values.clone() for name, values in first.tensors.items()}
        await peer.train(1)
        second = peer.whole_snapshot()
        assert first.tensors.keys() == second.tensors.keys() == was.keys()
        assert all(values.equal(was[name]) for name, values in first.tensors.items())
        assert not second.tensors["params"].equal(was["params"])
        assert second.tensors["params"].equal(peer.params)
        peer.have_back(first)
        await peer.train(1)
        third = peer.whole_snapshot()
        assert all(values.data_ptr() == first.tensors[name].data_ptr() for name, values in third.tensors.items())
        assert third.tensors["params"].equal(peer.params)
        peer.slot("new")
        assert peer.whole_snapshot().tensors["slot new"].equal(peer.slot("new"))
        assert third.tensors["params"].equal(peer.params)


def test_snapshots_are_copies_in_memory_of_their_own_until_that_is_handed_back() -> None:
    fields = {"steps": 3, "batch_size": 2, "task": {"name": "quadratic"}, "inner": {"name": "adamw", "lr": 0.1}}
    run = validated({**fields, "fleet": {"workers": [{"count": 1}]}}, "snapshots")
    simulate(run.model_copy(update={"rule": Snapping()}))
