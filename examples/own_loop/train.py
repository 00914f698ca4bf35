"""A PyTorch script of one's own, whose loop is a worker of a run: the three lines with `decentral` or `sync` in them.

export DECENTRAL_SECRET=$(openssl rand -hex 32)
torchrun --nproc-per-node 2 examples/own_loop/train.py
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import decentral
from decentral.protocols import DiLoCo, Nesterov


def digits(seed: int, samples: int) -> TensorDataset:
    """Return points around ten centres in a plane of 16 dimensions, each with the number of its centre."""
    centres = torch.randn(10, 16, generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (samples,), generator=chance)
    return TensorDataset(centres[labels] + torch.randn(samples, 16, generator=chance), labels)


def main(steps: int) -> None:
    torch.manual_seed(0)  # all workers begin with the same weights
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    with decentral.join(rule=DiLoCo(period=20, outer=Nesterov(lr=0.7, momentum=0.5))) as fleet:
        sync = fleet.attach(model, optimizer)
        loader = DataLoader(digits(1 + fleet.worker, 32 * steps), batch_size=32, num_workers=1)
        for points, labels in loader:
            loss = nn.functional.cross_entropy(model(points), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            sync.step(loss)

    points, labels = digits(1000, 1000).tensors
    right = (model(points).argmax(1) == labels).float().mean()
    checksum = sum(parameter.detach().double().sum().item() for parameter in model.parameters())
    print(f"worker {fleet.worker}: {100 * right:.1f} % of new points are right; sum of the parameters {checksum!r}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
