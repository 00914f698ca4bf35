"""MuLoCo (arXiv 2505.23725): Muon as the inner optimiser, alone against torch's and under DiLoCo."""

from __future__ import annotations

import pytest
import torch
from cluster import NET, all_equal, cluster
from torch import nn

from decentral.inner import AdamW, Muon, orthogonalised
from decentral.journal import Trained
from decentral.protocols import DiLoCo, Int8, Nesterov
from decentral.sim.simulate import simulate
from decentral.state import layout_of

SHAPES = [(6, 4), (5,), (3, 8), (2, 2, 3)]
SIZES = [24, 5, 24, 12]
MATRICES = [(0, 6, 4), (29, 3, 8), (53, 2, 6)]


@pytest.mark.parametrize("shape", [(5, 5), (3, 12), (12, 3), (1, 4)])
def test_orthogonalised_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix) @ v.T
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-4)
    large = values > 0.05 * values.norm()
    assert bool(((inner.diagonal()[large] > 0.6) & (inner.diagonal()[large] < 1.3)).all())
    assert torch.allclose(orthogonalised(1e5 * matrix), orthogonalised(matrix), atol=1e-4)
    assert torch.equal(orthogonalised(torch.zeros(shape)), torch.zeros(shape))


def reference(grads: list[list[torch.Tensor]], params: list[torch.Tensor], inner: Muon) -> None:
    """Muon on matrices and torch's AdamW elsewhere, tensor by tensor."""
    vectors = [param for param in params if param.dim() == 1]
    adam = torch.optim.AdamW(
        vectors, lr=inner.lr, betas=inner.betas, eps=inner.eps, weight_decay=inner.weight_decay, foreach=False
    )
    averages = [torch.zeros_like(param) for param in params]
    for of_step in grads:
        for param, grad, average in zip(params, of_step, averages, strict=True):
            if param.dim() == 1:
                param.grad = grad.clone()
                continue
            average.copy_(inner.momentum * average + (1 - inner.momentum) * grad)
            ahead = ((1 - inner.momentum) * grad + inner.momentum * average).flatten(1)
            x = ahead / ahead.norm()
            for _ in range(5):
                x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
            length = 0.2 * max(ahead.shape) ** 0.5
            param.copy_((1 - inner.lr * inner.weight_decay) * param - inner.lr * length * x.view_as(param))
        adam.step()


@pytest.mark.parametrize("inner", [Muon(), Muon(lr=0.02, momentum=0.8, betas=(0.8, 0.95), weight_decay=0.0)], ids=repr)
def test_a_flat_step_equals_the_reference_on_separate_tensors(inner: Muon) -> None:
    generator = torch.Generator().manual_seed(0)
    separate = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads = [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(8)]
    flat = torch.cat([param.flatten() for param in separate])
    optimizer = inner.fit(MATRICES).build(flat)
    for step, of_step in enumerate(grads):
        flat.grad = torch.cat([grad.flatten() for grad in of_step])
        inner.step(optimizer, step, total_steps=8)
    reference(grads, separate, inner)
    assert torch.allclose(flat, torch.cat([param.flatten() for param in separate]), rtol=0, atol=2e-5)


def test_a_matrix_moves_as_with_torchs_muon() -> None:
    """Torch iterates in bfloat16: its steps differ by a percent or two."""
    generator = torch.Generator().manual_seed(2)
    start = torch.randn(8, 5, generator=generator)
    theirs, ours = nn.Parameter(start.clone()), start.flatten().clone()
    other = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    inner = Muon(lr=0.01)
    optimizer = inner.fit([(0, 8, 5)]).build(ours)
    for step in range(6):
        grad = torch.randn(8, 5, generator=generator)
        theirs.grad, ours.grad = grad.clone(), grad.flatten()
        other.step()
        inner.step(optimizer, step, total_steps=6)
    moved = ours - start.flatten()
    assert (moved - (theirs.data.flatten() - start.flatten())).norm() < 0.03 * moved.norm()


def test_without_matrices_it_is_adamw() -> None:
    flat, other = torch.ones(7), torch.ones(7)
    inner, adam = Muon(), AdamW()
    optimizer, plain = inner.fit([]).build(flat), adam.build(other)
    for step in range(5):
        flat.grad = torch.linspace(-1, 2, 7) * (step + 1)
        other.grad = flat.grad.clone()
        inner.step(optimizer, step, 5)
        adam.step(plain, step, 5)
    assert torch.allclose(flat, other, atol=1e-6)


def test_the_layers_matrices_are_found_and_embedding_and_head_are_left_out() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)])
            self.head = nn.Linear(4, 10)

    matrices = layout_of(Model()).matrices()
    assert [(rows, columns) for _, rows, columns in matrices] == [(4, 4)] * 3
    assert [start for start, _, _ in matrices] == [48, 76, 104]


@pytest.mark.parametrize("codec", [None, Int8()])
def test_diloco_with_muon_trains_and_replicas_are_equal(codec: Int8 | None) -> None:
    fields = {} if codec is None else {"codec": codec}
    rule = DiLoCo(period=5, outer=Nesterov(lr=0.7, momentum=0.6), **fields)  # type: ignore[arg-type]
    muon, adam = (
        simulate(cluster(rule, 3, 40, task=NET, inner=inner, batch_size=4)) for inner in (Muon(lr=0.02), AdamW(lr=0.02))
    )
    assert all_equal(muon)
    assert not torch.equal(muon.params[0], adam.params[0])
    losses = [record.loss for record in muon.records if isinstance(record, Trained) and record.loss is not None]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])
    again = simulate(cluster(rule, 3, 40, task=NET, inner=Muon(lr=0.02), batch_size=4))
    assert torch.equal(muon.params[0], again.params[0])
