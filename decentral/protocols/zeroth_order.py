"""What rules share that train by losses alone: directions made of a seed, and slopes along them."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.peer import Peer


def direction(seed: int, like: Tensor) -> Tensor:
    """Return standard normal numbers, `[n]` float32, the same ones on every device; a phantom for a phantom."""
    if not isinstance(like, Tensor):
        return like
    return torch.randn(like.numel(), generator=torch.Generator().manual_seed(seed)).to(like.device)


async def slope(peer: Peer, seed: int, epsilon: float) -> float:
    """Return (L(theta + epsilon z) - L(theta - epsilon z)) / (2 epsilon) on the next batch, z the seed's direction.

    The parameters are bit for bit what they were before. Costs two forward passes.
    """
    here, along = peer.params.clone(), direction(seed, peer.params)
    peer.params.add_(along, alpha=epsilon)
    above = await peer.loss()
    peer.params.copy_(here).sub_(along, alpha=epsilon)
    below = await peer.loss()
    peer.params.copy_(here)
    return (above - below) / (2 * epsilon)
