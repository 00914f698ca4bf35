"""Flat state: the model's tensors are views of one vector, whatever the model looks like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from decentral.errors import TaskError
from decentral.state import Entry, Layout, bind, layout_of


class Odd(nn.Module):
    """Tied weights, a frozen one, a scalar, a transposed one, buffers, an unused one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.embedding = nn.Embedding(5, 3)
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.turned = nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3).T)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.unused = nn.Parameter(torch.full((2,), 7.0))

    def forward(self, index: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(index)) @ self.turned @ self.turned.T * self.scale
        logits: Tensor = self.head(hidden)
        return logits


def bound(model: nn.Module) -> tuple[Layout, Tensor, Tensor]:
    layout = layout_of(model)
    params, grads = torch.zeros(layout.size), torch.zeros(layout.size)
    bind(model, layout, params, grads)
    return layout, params, grads


def test_the_layout_lists_trainable_parameters_without_gaps_and_tied_ones_once() -> None:
    layout = layout_of(Odd())
    assert [entry.name for entry in layout.entries] == [
        "scale",
        "turned",
        "unused",
        "embedding.weight",
        "norm.weight",
        "norm.bias",
    ]
    place = 0
    for entry in layout.entries:
        assert entry.start == place
        assert entry.stop - entry.start == torch.Size(entry.shape).numel()
        place = entry.stop
    assert layout.size == place == 1 + 6 + 2 + 15 + 3 + 3


def test_binding_keeps_the_values_and_shares_the_storage() -> None:
    model = Odd()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    layout, params, grads = bound(model)
    named = dict(model.named_parameters())
    for entry in layout.entries:
        assert torch.equal(named[entry.name], before[entry.name])
        assert named[entry.name].data_ptr() == params[entry.start :].data_ptr()
        gradient = named[entry.name].grad
        assert gradient is not None
        assert gradient.data_ptr() == grads[entry.start :].data_ptr()
    params.fill_(3.0)
    assert all(bool((named[entry.name] == 3).all()) for entry in layout.entries)
    with torch.no_grad():
        model.turned[2, 1] = -1.0
    assert (params == -1).sum() == 1
    assert torch.equal(model.frozen, torch.ones(4))


def test_tied_weights_stay_tied() -> None:
    model = Odd()
    bound(model)
    assert model.head.weight is model.embedding.weight


def test_gradients_land_in_the_flat_vector() -> None:
    torch.manual_seed(0)
    plain, flat = Odd(), Odd()
    flat.load_state_dict(plain.state_dict())
    layout, _, grads = bound(flat)
    index = torch.tensor([0, 3, 4])
    for model in (plain, flat):
        model(index).square().mean().backward()
    named = dict(plain.named_parameters())
    for entry in layout.entries:
        expected = named[entry.name].grad
        found = grads[entry.start : entry.stop].view(entry.shape)
        assert torch.allclose(found, torch.zeros_like(found) if expected is None else expected, atol=1e-5)
    assert grads.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_refused_by_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(dtype))
    with pytest.raises(TaskError, match=r"parameter '1\.weight' is torch\.\w+; .* must be torch\.float32"):
        layout_of(model)


def test_frozen_parameters_may_have_any_type() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double().requires_grad_(False))
    assert layout_of(model).size == 6


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(3, 3).requires_grad_(False)], ids=["none", "all frozen"])
def test_a_model_with_nothing_to_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(TaskError, match="no trainable parameters"):
        layout_of(model)


def test_layers_in_names_of_every_style() -> None:
    def layers(*names: str) -> list[tuple[int, int]]:
        entries = tuple(Entry(name, (1,), place, place + 1) for place, name in enumerate(names))
        return Layout(entries).layers()

    assert layers("a.0.w", "a.0.b", "a.1.w", "head.w") == [(0, 2), (2, 3)]
    assert layers("0.w", "0.b", "2.w") == [(0, 2), (2, 3)]
    assert layers("layer1.0.w", "layer1.1.w", "layer2.0.w") == [(0, 2), (2, 3)]
    assert layers("gpt2.wte.w", "gpt2.h.0.w", "gpt2.h.10.w", "gpt2.h.1.w") == [(1, 2), (2, 3), (3, 4)]
    assert layers("enc.0.w", "enc.1.w", "dec.0.w", "dec.1.w", "dec.2.w") == [(2, 3), (3, 4), (4, 5)]
    assert layers("m.layers.0.experts.0.w", "m.layers.0.experts.1.w", "m.layers.1.experts.0.w") == [(0, 2), (2, 3)]
    assert layers("w", "b") == []
