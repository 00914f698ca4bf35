"""LayerStack: its size, its formula, and that it learns."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from decentral.config import validated
from decentral.sim.simulate import simulate
from decentral.state import layout_of
from decentral.tasks import LayerStack


@pytest.mark.parametrize(
    ("layers", "parameters", "width"), [(24, 1e9, 41_666_667), (108, 100e9, 925_925_926), (3, 1, 1)]
)
def test_layers_are_equal_and_the_gain_stands_outside(layers: int, parameters: float, width: int) -> None:
    with torch.device("meta"):
        layout = layout_of(LayerStack(layers=layers, parameters=parameters).model())
    assert [stop - start for start, stop in layout.layers()] == [width] * layers
    assert [span for span in layout.blocks() if span not in layout.layers()] == [(0, 1)]


def test_the_model_is_the_formula() -> None:
    task = LayerStack(layers=2, parameters=6)
    model = task.model()
    gain, first, second = model.parameters()
    with torch.no_grad():
        gain.fill_(1.5)
        first.copy_(torch.tensor([1.0, 2.0, 3.0]))
        second.copy_(torch.tensor([0.5, 0.0, -1.0]))
    x = task.batch(0, 0, 4)
    expected = 1.5 * x * (1 + torch.tensor([0.5, 1.0, 1.5])) * (1 + torch.tensor([0.25, 0.0, -0.5]))
    assert torch.allclose(model(x), expected)
    assert task.loss(model, x).item() == pytest.approx((expected - 2 * x).square().mean().item())


def test_a_batch_is_a_part_of_its_workers_stream() -> None:
    task = LayerStack(layers=3, parameters=30)
    assert torch.equal(task.batch(1, 0, 8)[3:5], task.batch(1, 3, 2))
    assert not torch.equal(task.batch(0, 0, 2), task.batch(1, 0, 2))


def test_it_learns() -> None:
    table = {
        "steps": 40,
        "task": {"name": "layer_stack", "layers": 4, "parameters": 40},
        "rule": {"name": "diloco", "period": 10},
        "inner": {"name": "sgd", "lr": 0.1},
        "fleet": {"workers": [{"count": 2}]},
    }
    outcome = simulate(validated(table, "test"))
    assert outcome.before["loss"] == pytest.approx(1.0, rel=0.2)  # of x - 2 x
    assert outcome.after["loss"] < 0.1 * outcome.before["loss"]


@pytest.mark.parametrize("fields", [{"layers": 0}, {"parameters": 0}, {"parameters": float("inf")}])
def test_absurd_sizes_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LayerStack(**fields)  # type: ignore[arg-type]
