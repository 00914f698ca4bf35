"""`LayerStack`: a model that is all size, for asking what models of any size would cost to train."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from decentral.task import Task
from decentral.tasks import streams


class LayerStack(Task):
    """A stack of equal layers, each a weight for every channel, that learns to double its input.

        h <- gain x;   h <- h + w_l h / layers  for every layer l;   loss = mean (h - 2 x)^2

    Timing-only simulations allocate nothing, so `parameters` may be a hundred billion. The gain stands outside the
    layers, as an embedding does. A batch is x, [size, parameters / layers] float32.
    """

    name: ClassVar[str] = "layer_stack"

    layers: PositiveInt = 12
    """Layers of the stack."""
    parameters: float = Field(default=12e3, ge=1, allow_inf_nan=False)
    """Parameters of all layers together, rounded so that each layer has as many; at least one a layer."""
    tokens: PositiveInt | None = None
    """Tokens that a sample stands for, by which the simulator tells step times on a device; unset: none."""
    eval_samples: PositiveInt = 64
    """Samples that `evaluate` takes, of a worker that does not train."""
    sample_seed: NonNegativeInt = 0
    """Chooses the samples that are trained on."""

    @property
    def tokens_per_sample(self) -> int | None:
        return self.tokens

    @property
    def width(self) -> int:
        """Parameters of a layer."""
        return max(1, round(self.parameters / self.layers))

    def model(self) -> nn.Module:
        """Return the stack; its call maps [size, width] to [size, width]."""
        return _Stack(self.layers, self.width)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the gain and the layers."""
        assert isinstance(model, _Stack)
        return [model.gain, *model.layers]

    def batch(self, worker: int, start: int, size: int) -> Tensor:
        """Return x, [size, width] float32, standard normal."""
        return self._inputs(streams.seeded("layer_stack", self.sample_seed), worker, start, size)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Return the mean squared distance from 2 x."""
        loss: Tensor = (model(batch) - 2 * batch).square().mean()
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return `loss` on samples that nobody trains on."""
        batch = self._inputs("layer_stack", -1, 0, self.eval_samples).to(next(model.parameters()).device)
        return {"loss": self.loss(model, batch).item()}

    def _inputs(self, purpose: str, worker: int, start: int, size: int) -> Tensor:
        draws = streams.normals(purpose, worker, start * self.width, size * self.width)
        return torch.from_numpy(draws).float().view(size, self.width)


class _Stack(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.gain = _Gain()
        self.layers = nn.ModuleList(_Layer(width, 1 / layers) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[size, width] -> [size, width]."""
        hidden: Tensor = self.gain(x)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class _Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """[size, width] -> [size, width]."""
        out: Tensor = self.weight * x
        return out


class _Layer(nn.Module):
    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self._scale = scale

    def forward(self, hidden: Tensor) -> Tensor:
        """[size, width] -> [size, width]."""
        return hidden + self._scale * self.weight * hidden
