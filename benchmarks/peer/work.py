"""The same models and data for decentral and the systems beside it, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

NODES = 4
PERIOD = 10
SHARE = 0.005
"""Share of the parameters that SPARTA averages every step."""
STEPS = {"mlp": 300, "gpt": 60}
BATCH = {"mlp": 64, "gpt": 4}
LR = {"mlp": 1e-3, "gpt": 1e-3}
RULES = ("ddp", "fedavg", "diloco", "sparta", "demo")
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 256, 128, 128, 4, 4
HELD_OUT = 64
"""Samples of the evaluations before and after."""


class MLP(nn.Module):
    """26,122 parameters: 64 features, two hidden layers of 128, 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(self.layers(batch[0]), batch[1])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        heads = self.qkv(self.before(x)).view(rows, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return x + self.mlp(self.after(x))


class GPT(nn.Module):
    """A decoder of 859,136 parameters on bytes, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.last = nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, batch: Tensor) -> Tensor:
        x = self.tokens(batch[:, :-1]) + self.places.weight
        logits = functional.linear(self.last(self.blocks(x)), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def model_of(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP() if kind == "mlp" else GPT()


def data_of(kind: str, count: int, seed: int) -> tuple[Tensor, ...]:
    """Return the columns of so many samples: classes of noisy features, or bytes of noisy arithmetic rows."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "mlp":
        centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
        labels = torch.randint(10, (count,), generator=generator)
        return centres[labels] + 3.0 * torch.randn(count, 64, generator=generator), labels
    start = torch.randint(VOCABULARY, (count, 1), generator=generator)
    stride = torch.randint(1, 8, (count, 1), generator=generator)
    rows = (start + stride * torch.arange(CONTEXT + 1)) % VOCABULARY
    noise = torch.rand(rows.shape, generator=generator) < 0.05
    return (torch.where(noise, torch.randint(VOCABULARY, rows.shape, generator=generator), rows),)


def samples(kind: str) -> int:
    """How many samples a run trains on, over all nodes."""
    return STEPS[kind] * BATCH[kind] * NODES


def chance(kind: str) -> float:
    """The loss of guessing."""
    return math.log(10 if kind == "mlp" else VOCABULARY)
