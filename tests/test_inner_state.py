"""What rules may see of the inner optimiser: its running means, its learning rate, and the optimisers with several."""

from __future__ import annotations

import itertools

import pytest
import torch
from cluster import NET, Net, cluster, drive
from pydantic import ValidationError
from sockets import train_here

from decentral.errors import ConfigError
from decentral.inner import ADOPT, INNER, SGD, AdamW, Inner, MultiMomentum, QHAdam
from decentral.offload import OffloadedReplica
from decentral.peer import Peer
from decentral.phantom import Phantom
from decentral.protocols import DESLOC, Int8
from decentral.replica import PhantomReplica, TorchReplica

KEEPERS: list[Inner] = [SGD(lr=0.1, momentum=0.9), AdamW(lr=0.1), ADOPT(lr=0.1), QHAdam(lr=0.1)]


def replica(inner: Inner, kind: type[TorchReplica] = TorchReplica) -> TorchReplica:
    return kind(Net(), inner, worker=0, seed=0, batch_size=4, total_steps=100)


# -- inner_state ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TorchReplica, OffloadedReplica])
@pytest.mark.parametrize("inner", KEEPERS, ids=lambda inner: inner.name)
def test_states_are_zero_at_first_and_live_afterwards(inner: Inner, kind: type[TorchReplica]) -> None:
    made = replica(inner, kind)
    states = {name: made.inner_state(name) for name in (*inner.momenta, *inner.variances)}
    assert states
    assert all(state.shape == made.params.shape and not state.any() for state in states.values())
    made.train(0, 3)
    assert all(state.any() for state in states.values())
    assert all(made.inner_state(name) is state for name, state in states.items())


@pytest.mark.parametrize("kind", [TorchReplica, OffloadedReplica])
def test_the_next_step_uses_what_was_written(kind: type[TorchReplica]) -> None:
    made = replica(SGD(lr=0.1, momentum=0.5), kind)
    made.train(0, 1)
    made.inner_state("momentum_buffer").fill_(2.0)
    before = made.params.clone()
    made.grads.zero_()
    made.update(1)
    assert torch.allclose(before - made.params, torch.full_like(before, 0.1 * 0.5 * 2.0))


@pytest.mark.parametrize(
    ("inner", "kept"), [(SGD(lr=0.1), "keeps no running means"), (AdamW(), "keeps exp_avg, exp_avg_sq")]
)
def test_a_state_that_there_is_not_is_refused_in_both_kinds_of_replica(inner: Inner, kept: str) -> None:
    made = replica(inner)
    for each in (made, PhantomReplica(made.layout, 4, inner)):
        with pytest.raises(ConfigError, match=f"needs the inner optimiser's 'momentum_buffer'.*{kept}"):
            each.inner_state("momentum_buffer")


def test_a_phantom_has_the_same_states() -> None:
    phantom = PhantomReplica(replica(AdamW()).layout, 4, AdamW())
    state = phantom.inner_state("exp_avg")
    assert isinstance(state, Phantom)
    assert len(state) == phantom.layout.size


def test_a_rule_that_averages_states_comes_to_the_same_bits_with_offloading() -> None:
    run = cluster(DESLOC(period=1, codec=Int8()), 2, 6, task=NET, inner=ADOPT(lr=0.01))
    offloaded = run.model_copy(update={"real": run.real.model_copy(update={"offload": True})})
    plain, moved = train_here(run), train_here(offloaded)
    assert all(torch.equal(plain.params[worker], moved.params[worker]) for worker in (0, 1))


def test_a_rule_sees_states_and_learning_rates() -> None:
    inner = SGD(lr=0.4, momentum=0.9, warmup_steps=4)

    async def script(peer: Peer) -> tuple[bool, list[float], bool]:
        fresh = not peer.inner_state("momentum_buffer").any()
        await peer.train(5)
        rates = [peer.learning_rate(step) for step in (0, 1, 4, 9, 500)]
        return fresh and peer.inner == inner, rates, bool(peer.inner_state("momentum_buffer").any())

    fresh, rates, moved = drive(script, workers=1, steps=10, inner=inner)[0]
    assert fresh
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])
    assert moved


# -- optimisers with several momenta ----------------------------------------------------------------------------------


def walk(inner: Inner, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parameters after each step from zeros along the given gradients."""
    flat = torch.zeros_like(gradients[0])
    optimizer = inner.build(flat)
    path = []
    for step, gradient in enumerate(gradients):
        flat.grad = gradient.clone()
        inner.step(optimizer, step, len(gradients))
        assert torch.equal(flat.grad, gradient)
        path.append(flat.clone())
    return path


def some_gradients(count: int = 8, size: int = 20) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for _ in range(count)]


def test_qhadam_of_weight_0_or_decay_0_is_torchs_rmsprop() -> None:
    gradients = some_gradients()
    parameter = torch.nn.Parameter(torch.zeros(20))
    rmsprop = torch.optim.RMSprop([parameter], lr=0.01, alpha=0.9, eps=1e-6)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        rmsprop.step()
    for decay, weight in [(0.9, 0.0), (0.0, 1.0), (0.0, 0.6)]:
        inner = QHAdam(lr=0.01, decays=(decay,), weights=(weight,), beta2=0.9)
        assert torch.allclose(walk(inner, gradients)[-1], parameter.data, atol=1e-6)


def test_qhadam_of_weight_1_is_torchs_adam_without_its_bias_correction() -> None:
    """Torch divides m by 1 - b1^t and v by 1 - b2^t; a learning rate and an eps for each step undo that."""
    gradients = some_gradients()
    parameter = torch.nn.Parameter(torch.zeros(20))
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.8, 0.9), eps=1e-6)
    for step, gradient in enumerate(gradients, 1):
        adam.param_groups[0]["lr"] = 0.01 * (1 - 0.8**step) / (1 - 0.9**step) ** 0.5
        adam.param_groups[0]["eps"] = 1e-6 / (1 - 0.9**step) ** 0.5
        parameter.grad = gradient.clone()
        adam.step()
    inner = QHAdam(lr=0.01, decays=(0.8,), weights=(1.0,), beta2=0.9)
    assert torch.allclose(walk(inner, gradients)[-1], parameter.data, atol=1e-6)


def test_an_impulse_comes_back_with_the_weights_of_all_momenta() -> None:
    """A gradient k steps ago counts sum_j omega_j (1 - beta_j) beta_j^k, and the fresh one what is missing to 1."""
    decays, weights = (0.5, 0.9), (0.3, 0.6)
    inner = QHAdam(lr=1e6, eps=1e6, decays=decays, weights=weights)  # the root of v counts nothing beside eps
    path = walk(inner, [torch.ones(1), *[torch.zeros(1)] * 5])
    moves = [-path[0].item(), *((before - after).item() for before, after in itertools.pairwise(path))]
    for k, moved in enumerate(moves):
        expected = sum(w * (1 - b) * b**k for b, w in zip(decays, weights, strict=True)) + (0.1 if k == 0 else 0.0)
        assert moved == pytest.approx(expected, rel=1e-4)


def test_adopt_step_by_step() -> None:
    lr, b1, b2 = 0.1, 0.9, 0.99
    path = walk(ADOPT(lr=lr, decays=(b1,), beta2=b2), [torch.tensor([g]) for g in (2.0, 1.0, -30.0, 0.5)])
    x, u, v = 0.0, 0.0, 4.0
    assert path[0].item() == 0  # the first gradient only sets v
    for step, (gradient, after) in enumerate(zip((1.0, -30.0, 0.5), path[1:], strict=True), 1):
        bound = step**0.25
        normal = max(-bound, min(bound, gradient / v**0.5))
        u = b1 * u + (1 - b1) * normal
        x -= lr * u
        v = b2 * v + (1 - b2) * gradient**2
        assert after.item() == pytest.approx(x, rel=1e-5)


def test_adopt_does_not_divide_a_gradient_by_itself() -> None:
    """A spike after quiet steps is cut by the bound, not normalised away."""
    quiet, spike = torch.tensor([1.0]), torch.tensor([1.2])
    path = walk(ADOPT(lr=1.0, decays=(0.0,), beta2=0.0), [quiet, spike])
    assert (path[0] - path[1]).item() == pytest.approx(1.0)  # 1.2 / 1, cut to 1^(1/4)


@pytest.mark.parametrize("cls", [QHAdam, ADOPT])
def test_values_are_clipped_and_weights_decay(cls: type[MultiMomentum]) -> None:
    gradients = some_gradients()
    clipped = [gradient.clamp(-0.3, 0.3) for gradient in gradients]
    assert torch.equal(walk(cls(lr=0.1, clip_value=0.3), gradients)[-1], walk(cls(lr=0.1), clipped)[-1])
    flat = torch.ones(3)
    optimizer = cls(lr=0.1, weight_decay=0.5).build(flat)
    flat.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(flat, torch.full((3,), 0.95))


@pytest.mark.parametrize("fields", [{"decays": (0.9, 0.99)}, {"weights": (0.6, 0.6), "decays": (0.9, 0.99)}])
@pytest.mark.parametrize("name", ["qhadam", "adopt"])
def test_weights_that_do_not_fit_are_refused(name: str, fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="one for each of the 2 decays, together at most 1"):
        INNER[name].model_validate({"lr": 0.1, **fields})
