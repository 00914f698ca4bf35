"""One tensor of a model or an optimiser, whole or sharded, as a part of a flat float32 vector."""

from __future__ import annotations

import torch
from torch import Tensor

from decentral.embedded.site import Site


def read(tensor: Tensor, flat: Tensor | None) -> None:
    """Copy `tensor`, of any floating dtype and device, into `flat` `[n]` float32; None: take part in gathering it.

    A tensor of lower precision was rounded when it was written. What that has cut off is in `flat` still, and stays
    there as long as it makes no difference to the tensor: so small changes by a rule add up over rounds.
    """
    values = _whole(tensor)
    if flat is None:
        return
    values = values.to(flat.device).reshape(-1)
    if values.dtype == torch.float32:
        flat.copy_(values)
        return
    as_read = values.float()
    kept = as_read + (flat - flat.to(values.dtype).float())
    flat.copy_(torch.where(kept.to(values.dtype) == values, kept, as_read))


def write(tensor: Tensor, flat: Tensor | None, site: Site) -> None:
    """Copy `flat` `[n]` float32, the first rank's, into `tensor` in place; leave alone what is the same already."""
    if flat is None:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    else:
        values = flat.view(tensor.shape).to(tensor.device, tensor.dtype)
    if site.size > 1:
        tensor.copy_(_sharded_as(tensor, site.spread(values)))
    elif not torch.equal(values, tensor):
        tensor.copy_(values)


def _whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, gathered if each rank holds a shard of it (a `DTensor`)."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach()


def _sharded_as(tensor: Tensor, values: Tensor) -> Tensor:
    if not hasattr(tensor, "full_tensor"):
        return values
    from torch.distributed.tensor import DTensor, distribute_tensor  # they take a second to import

    assert isinstance(tensor, DTensor)
    return distribute_tensor(values, tensor.device_mesh, tensor.placements)
