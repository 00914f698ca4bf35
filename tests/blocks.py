"""Small tasks whose models are sequences of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from decentral.task import Task


class Chain(Task):
    """A chain of equal linear layers with tanh between them, that learns to turn its input round; any batch size."""

    width: int = 8
    layers: int = 4

    def model(self) -> nn.Module:
        return nn.Sequential(
            *[layer for _ in range(self.layers) for layer in (nn.Linear(self.width, self.width), nn.Tanh())]
        )

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        rows = [torch.randn(self.width, generator=seeded(worker, start + index)) for index in range(size)]
        return torch.stack(rows)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = (model(batch) - batch.flip(1).tanh()).square().mean()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": self.loss(model, self.batch(-1, 0, 16)).item()}


class Mirrored(Chain):
    """A chain whose first two layers begin alike, and so do its last two."""

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        for before, after in ((0, 2), (-4, -2)):
            model[after].load_state_dict(model[before].state_dict())
        return model


class _Winding(nn.Linear):
    """A linear layer that does a thousand small things besides."""

    def forward(self, values: Tensor) -> Tensor:
        for _ in range(1000):
            values = values + 0
        return super().forward(values)


class Slow(Chain):
    """A chain whose first layer takes longer than all others together."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            _Winding(self.width, self.width), *[nn.Linear(self.width, self.width) for _ in range(self.layers - 1)]
        )


class Noisy(Chain):
    """A chain with dropout behind every second layer, and a loss that draws before it asks the model and after."""

    def model(self) -> nn.Module:
        noises = [nn.Dropout(0.3) if index % 2 else nn.Identity() for index in range(self.layers)]
        layers = [(nn.Linear(self.width, self.width), nn.Tanh(), noise) for noise in noises]
        return nn.Sequential(*[module for layer in layers for module in layer])

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        shown = torch.rand_like(batch) < 0.8
        errors = (model(batch * shown) - batch.flip(1).tanh()).square() * (2 - shown.float())
        return (errors * torch.rand_like(errors)).mean()


class _Transposed(nn.Module):
    """Multiplies by the transposed weight of a layer that lies elsewhere."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, values: Tensor) -> Tensor:
        return values @ self.weight


class TiedEnds(Chain):
    """A chain whose last layer has the weights of its first, as language models have."""

    def model(self) -> nn.Module:
        first = nn.Linear(self.width, 2 * self.width)
        layers = [layer for _ in range(self.layers) for layer in (nn.Linear(2 * self.width, 2 * self.width), nn.Tanh())]
        return nn.Sequential(first, *layers, _Transposed(first))


def seeded(worker: int, sample: int) -> torch.Generator:
    return torch.Generator().manual_seed((worker + 1) * 1_000_003 + sample)


class Pair(nn.Module):
    """Returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(values), values


class Tied(nn.Module):
    """Uses a weight that somebody else has."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.other = other

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.other(values)
        return out


class Odd(Chain):
    """A chain with something that cannot be cut: `what` says what."""

    what: str = ""

    def model(self) -> nn.Module:
        first = nn.Linear(8, 8)
        ends: dict[str, nn.Module] = {"pair": Pair(), "tied": Tied(first), "norm": nn.BatchNorm1d(8)}
        return nn.Sequential(first, nn.Tanh(), ends[self.what], nn.Tanh(), nn.Linear(8, 8))


class Loner(nn.Module):
    """A model that is no sequence, with a parameter of its own beside its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, values: Tensor) -> Tensor:
        for layer in self.layers:
            values = self.scale * layer(values)
        return values


class Unsaid(Chain):
    """A model that is no `nn.Sequential`, of which the task does not say the blocks."""

    def model(self) -> nn.Module:
        return Loner()


class Forgetful(Unsaid):
    """Says the blocks, and forgets a parameter."""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        assert isinstance(model, Loner)
        return list(model.layers)


class TwoInputs(Chain):
    """Calls its model on two tensors."""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch, batch).square().mean()
        return loss


def named(task: type[Task], **fields: Any) -> dict[str, Any]:
    return {"name": f"blocks:{task.__name__}", **fields}
