"""Replicas that pass from one group of workers to another, who all take them or none does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from decentral.errors import PeerGone
from decentral.peer import Peer
from decentral.protocols.codecs import Float32
from decentral.protocols.rounds import Round
from decentral.wire import FrameError, Tag

CHANNEL = "copy"


def give(peer: Peer, parts: Mapping[str, Tensor], donors: Sequence[int], takers: Sequence[int], number: int) -> None:
    """Send copies of `parts`, by name, to our share of the `takers`, whose donors we are among; wait for nothing."""
    for place, taker in enumerate(takers):
        if donors[place % len(donors)] == peer.id:
            for name, values in parts.items():
                peer.send(taker, Tag(CHANNEL, number, name), Float32().encode(values))


async def take(
    peer: Peer, parts: Mapping[str, Tensor], donors: Sequence[int], takers: tuple[int, ...], number: int
) -> bool:
    """Replace `parts` by what our donor has sent; return False, and leave them, if any of the takers got less than all.

    The takers, of whom we are one, settle that in a round of their own. All workers' calls of copy `number` have the
    same `donors` and `takers`.
    """
    source = donors[takers.index(peer.id) % len(donors)]
    came: dict[str, Tensor] = {}
    try:
        for name, live in parts.items():
            _, packet = await peer.recv(source, Tag(CHANNEL, number, name))
            came[name] = Float32().decode(packet, live)
    except (PeerGone, TimeoutError):
        pass
    except FrameError as error:
        peer.refuse(source, error)
    round_ = Round(peer, Float32(), channel="adopt", group=takers)
    round_.contribute(torch.tensor([float(len(came) == len(parts))]))
    share = await round_.settle()
    peer.close(CHANNEL, number)
    if share is None or float(share[0]) < 1:
        return False
    for name, live in parts.items():
        live.copy_(came[name])
    return True
