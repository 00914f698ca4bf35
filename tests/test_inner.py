"""The inner optimisers: schedules by hand, and the fused flat step against torch.optim."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from decentral.errors import ConfigError
from decentral.inner import INNER, SGD, AdamW, Inner

SHAPES = [(7, 5), (5,), (3, 4)]

OPTIMISERS: list[Inner] = [
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    AdamW(),
    AdamW(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3),
]


def torchs(inner: Inner, params: list[torch.Tensor], **loop: bool) -> torch.optim.Optimizer:
    """The same optimiser by torch, with the loop over tensors that is asked for."""
    if isinstance(inner, SGD):
        return torch.optim.SGD(
            params,
            lr=inner.lr,
            momentum=inner.momentum,
            nesterov=inner.nesterov,
            weight_decay=inner.weight_decay,
            **loop,
        )
    assert isinstance(inner, AdamW)
    return torch.optim.AdamW(
        params, lr=inner.lr, betas=inner.betas, eps=inner.eps, weight_decay=inner.weight_decay, **loop
    )


@pytest.mark.parametrize("inner", OPTIMISERS, ids=repr)
def test_a_fused_flat_step_equals_plain_torch_on_separate_tensors(inner: Inner) -> None:
    torch.manual_seed(0)
    separate = [torch.randn(shape) for shape in SHAPES]
    flat = torch.cat([param.flatten() for param in separate])
    reference, optimizer = torchs(inner, separate, foreach=False), inner.build(flat)
    for step in range(10):
        for param in separate:
            param.grad = torch.randn_like(param)
        flat.grad = torch.cat([param.grad.flatten() for param in separate if param.grad is not None])
        reference.step()
        inner.step(optimizer, step, total_steps=10)
    assert torch.allclose(flat, torch.cat([param.flatten() for param in separate]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", OPTIMISERS, ids=repr)
def test_a_step_is_that_of_torchs_own_fused_optimiser_to_the_bit(inner: Inner) -> None:
    torch.manual_seed(0)
    flat = torch.randn(5000)
    other = flat.clone()
    reference, optimizer = torchs(inner, [other], fused=True), inner.build(flat)
    for step in range(5):
        flat.grad = torch.randn_like(flat)
        other.grad = flat.grad.clone()
        reference.step()
        inner.step(optimizer, step, total_steps=5)
        assert flat.equal(other)


class OfTorch(Inner):
    """A user's own, built from torch.optim."""

    def build(self, params: torch.Tensor) -> torch.optim.Optimizer:
        return torch.optim.RMSprop([params], lr=self.lr)


def test_a_users_own_may_be_one_of_torchs() -> None:
    inner = OfTorch(lr=0.5, warmup_steps=2)
    flat, other = torch.ones(3), torch.ones(3)
    flat.grad, other.grad = torch.full((3,), 2.0), torch.full((3,), 2.0)
    inner.step(inner.build(flat), 0, total_steps=4)
    torch.optim.RMSprop([other], lr=0.25).step()
    assert flat.equal(other)


def test_clipping_equals_clip_grad_norm_over_the_separate_tensors() -> None:
    separate = [torch.zeros(shape) for shape in SHAPES]
    for param in separate:
        param.grad = torch.randn_like(param)
    flat = torch.zeros(sum(param.numel() for param in separate))
    flat.grad = torch.cat([param.grad.flatten() for param in separate if param.grad is not None])
    torch.nn.utils.clip_grad_norm_(separate, 0.5)
    inner = SGD(lr=1.0, clip_norm=0.5)
    inner.step(inner.build(flat), 0, total_steps=1)
    expected = torch.cat([param.grad.flatten() for param in separate if param.grad is not None])
    assert torch.allclose(-flat, expected, atol=1e-7)
    assert flat.norm() == pytest.approx(0.5, rel=1e-4)


def test_a_gradient_within_the_norm_is_left_alone() -> None:
    flat = torch.zeros(4)
    flat.grad = torch.tensor([0.3, 0.0, 0.4, 0.0])
    inner = SGD(lr=1.0, clip_norm=0.6)
    inner.step(inner.build(flat), 0, total_steps=1)
    assert torch.equal(flat, torch.tensor([-0.3, 0.0, -0.4, 0.0]))


def test_a_step_uses_the_schedule() -> None:
    flat = torch.zeros(1)
    inner = SGD(lr=1.0, warmup_steps=2, schedule="wsd", decay_fraction=0.5, final_lr_fraction=0.0)
    optimizer = inner.build(flat)
    moved = []
    for step in range(8):
        before = flat.item()
        flat.grad = torch.ones(1)
        inner.step(optimizer, step, total_steps=8)
        moved.append(before - flat.item())
    assert moved == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_constant() -> None:
    inner = SGD(lr=0.2)
    assert [inner.lr_at(step, 10) for step in (0, 5, 9, 50)] == [0.2] * 4


def test_warm_up_is_linear_and_begins_above_zero() -> None:
    inner = SGD(lr=0.4, warmup_steps=4)
    assert [inner.lr_at(step, 10) for step in range(6)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_falls_from_the_warm_up_to_the_last_step() -> None:
    inner = SGD(lr=1.0, warmup_steps=10, schedule="cosine", final_lr_fraction=0.2)
    # A third of the way: cos(60 degrees) = 1/2, so 0.75 of the fall is still to come.
    expected = {9: 1.0, 10: 1.0, 20: 0.2 + 0.8 * 0.75, 25: 0.6, 40: 0.2, 100: 0.2}
    assert {step: inner.lr_at(step, 40) for step in expected} == pytest.approx(expected)


def test_wsd_stays_and_then_falls_linearly() -> None:
    inner = AdamW(lr=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_lr_fraction=0.1)
    expected = {4: 0.5, 10: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1, 200: 0.1}
    assert {step: inner.lr_at(step, 100) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_warm_up_longer_than_the_run_is_refused(schedule: str) -> None:
    inner = SGD.model_validate({"lr": 1.0, "warmup_steps": 11, "schedule": schedule})
    with pytest.raises(ConfigError, match="warmup_steps=11 does not fit into a run of 10 steps; at most 10 do"):
        inner.lr_at(0, 10)


def test_a_warm_up_into_the_decay_is_refused() -> None:
    inner = SGD(lr=1.0, warmup_steps=7, schedule="wsd", decay_fraction=0.4)
    with pytest.raises(ConfigError, match="before its decay begins at step 6; at most 6 do"):
        inner.check(10)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_run_that_is_all_warm_up_ends_at_the_peak(schedule: str) -> None:
    inner = SGD.model_validate({"lr": 1.0, "warmup_steps": 4, "schedule": schedule})
    assert [inner.lr_at(step, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("sgd", {}, "Field required"),
        ("sgd", {"lr": 0.1, "nesterov": True}, "nesterov=True needs momentum above 0"),
        ("sgd", {"lr": 0.1, "momentum": 1.0}, "less than 1"),
        ("sgd", {"lr": 0.1, "betas": (0.9, 0.9)}, "betas"),
        ("adamw", {"lr": 0.0}, "greater than 0"),
        ("adamw", {"betas": (0.9, 1.0)}, "less than 1"),
        ("adamw", {"schedule": "linear"}, "'constant', 'cosine' or 'wsd'"),
        ("adamw", {"clip_norm": 0.0}, "greater than 0"),
        ("adamw", {"decay_fraction": 0.0}, "greater than 0"),
        ("adamw", {"warmup_steps": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_fields_are_refused(kind: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        INNER[kind].model_validate(fields)
