"""Quadratic: its closed forms against autograd and plain loops, and its noise."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from decentral.tasks import Quadratic


def test_the_loss_is_the_formula() -> None:
    task = Quadratic(dimension=3, curvature=(0.5, 1.0, 2.0), start=2.0)
    offset = 2.0 - task.centre(4)
    expected = 0.5 * (torch.tensor([0.5, 1.0, 2.0]) * offset**2).sum()
    assert torch.allclose(task.loss(task.model(), task.batch(4, 0, 5)), expected)


def test_the_gradient_is_curvature_times_the_offset() -> None:
    task = Quadratic()
    model = task.model()
    task.loss(model, task.batch(1, 0, 4)).backward()  # type: ignore[no-untyped-call]
    (x,) = model.parameters()
    assert x.grad is not None
    assert torch.allclose(x.grad, task.curvatures() * (x.detach() - task.centre(1)), atol=1e-6)


def test_after_sgd_equals_a_loop_of_torch_sgd() -> None:
    task = Quadratic(dimension=5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(20):
        optimizer.zero_grad()
        task.loss(model, task.batch(2, step, 1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    (x,) = model.parameters()
    assert torch.allclose(x, task.after_sgd(2, lr=0.3, steps=20), atol=1e-5)


def test_after_sgd_goes_on_from_where_it_is_told() -> None:
    task = Quadratic()
    halfway = task.after_sgd(0, lr=0.1, steps=7)
    assert torch.allclose(
        task.after_sgd(0, lr=0.1, steps=5, x0=halfway), task.after_sgd(0, lr=0.1, steps=12), atol=1e-6
    )
    assert torch.equal(task.after_sgd(0, lr=0.1, steps=0), torch.ones(task.dimension))


def test_the_gradient_of_the_mean_loss_is_zero_at_the_optimum() -> None:
    task = Quadratic(eval_workers=6)
    model = task.model()
    (x,) = model.parameters()
    with torch.no_grad():
        x.copy_(task.optimum(6))
    mean = torch.stack([task.loss(model, task.batch(worker, 0, 1)) for worker in range(6)]).mean()
    mean.backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-6
    assert task.evaluate(model) == {"loss": pytest.approx(mean.item())}


def test_curvature_ends_are_joined_by_a_geometric_row() -> None:
    task = Quadratic(dimension=3, curvature=(0.01, 1.0))
    assert torch.allclose(task.curvatures(), torch.tensor([0.01, 0.1, 1.0]))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_samples_do_not_depend_on_how_they_are_cut_into_batches(noise: float) -> None:
    task = Quadratic(noise=noise)
    parts = zip(task.batch(3, 0, 3), task.batch(3, 3, 5), strict=True)
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(task.batch(3, 0, 8), parts, strict=True))


def test_noise_is_normal_with_the_given_deviation_and_differs_between_workers() -> None:
    task = Quadratic(noise=0.5)
    (_, first), (_, second) = (task.batch(worker, 0, 5000) for worker in range(2))
    assert first.mean().abs() < 0.01
    assert first.std() == pytest.approx(0.5, rel=0.01)
    assert (first * second).mean().abs() < 0.01
    assert (first[1:] * first[:-1]).mean().abs() < 0.01


def test_noise_is_added_to_the_gradient() -> None:
    task = Quadratic(noise=0.5)
    model = task.model()
    batch = task.batch(0, 0, 4)
    task.loss(model, batch).backward()  # type: ignore[no-untyped-call]
    (x,) = model.parameters()
    assert x.grad is not None
    expected = task.curvatures() * (x.detach() - task.centre(0)) + batch[1].mean(dim=0)
    assert torch.allclose(x.grad, expected, atol=1e-6)


def test_spread_and_seed_choose_the_centres() -> None:
    wide, narrow = Quadratic(spread=2.0, dimension=1000), Quadratic(spread=1.0, dimension=1000)
    assert torch.allclose(wide.centre(0), 2 * narrow.centre(0))
    assert narrow.centre(0).std() == pytest.approx(1.0, rel=0.1)
    assert not torch.allclose(narrow.centre(0), narrow.centre(1))
    assert not torch.allclose(narrow.centre(0), Quadratic(dimension=1000, seed=1).centre(0))
    assert torch.equal(Quadratic(spread=0).centre(5), torch.zeros(16))


def test_a_centre_that_was_changed_in_place_is_not_remembered() -> None:
    task = Quadratic()
    before = task.centre(0).clone()
    task.centre(0).zero_()
    task.batch(0, 0, 1)[0].zero_()
    assert torch.equal(task.centre(0), before)


def test_everything_is_float32() -> None:
    task = Quadratic(noise=1.0)
    tensors = [*task.batch(0, 0, 2), *task.model().parameters(), task.optimum(3), task.after_sgd(0, 0.1, 3)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dimension": 4, "curvature": (1.0, 2.0, 3.0)}, "curvature has 3 numbers; give one for each of the 4"),
        ({"dimension": 1}, r"write curvature=\(1.0,\)"),
        ({"curvature": (0.0, 1.0)}, "greater than 0"),
    ],
)
def test_bad_curvature_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Quadratic.model_validate(fields)
