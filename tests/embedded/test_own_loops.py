"""What people do in their loops, one worker alone: between two rounds decentral does nothing to it."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import flat, free_address
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import decentral
from decentral.embedded import coordination
from decentral.errors import ConfigError, RunError, TaskError
from decentral.journal import Trained, read_journal
from decentral.peer import Peer
from decentral.protocols import DDP, DiLoCo, SingleMerge, SyncRule
from decentral.report.page import page, read_runs

STEPS = 7
NEVER = DiLoCo(period=10**6)


class Small(nn.Module):
    """A tied weight, a frozen one, batch normalisation and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.1)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(self.norm(self.first(x.to(self.first.weight.dtype))).relu())
        return self.last(self.frozen(hidden))


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECENTRAL_SECRET", "of-these-tests-alone")
    monkeypatch.setenv("DECENTRAL_WORKER", "0")
    monkeypatch.setenv("DECENTRAL_WORKERS", "1")
    monkeypatch.setenv("DECENTRAL_ADDRESS", free_address())


def batches(count: int) -> list[Tensor]:
    return list(torch.randn(count, 8, 6, generator=torch.Generator().manual_seed(1)))


def made(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(3)
    return Small().to(dtype)


def autocast(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch).square().mean()
    loss.backward()
    optimizer.step()


def scaled(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batch).square().mean()).backward()
    scaler.step(optimizer)


def accumulated(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    for part in batch.chunk(2):
        (model(part).square().mean() / 2).backward()
    optimizer.step()


def clipped(model: nn.Module, optimizer: Optimizer, batch: Tensor) -> None:
    model(batch).square().mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()


Work = Callable[[nn.Module, Optimizer, Tensor], None]


def trained(model: nn.Module, work: Work, rule: SyncRule | None) -> list[float]:
    """Return the parameters after `STEPS` of `work` with a scheduler, with that rule beside it or none."""
    torch.manual_seed(5)  # of dropout
    optimizer = AdamW(model.parameters(), lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, STEPS)

    def train(step: Callable[[], bool]) -> list[float]:
        for batch in batches(STEPS):
            optimizer.zero_grad()
            work(model, optimizer, batch)
            scheduler.step()
            assert step()
        return flat(model)

    if rule is None:
        return train(lambda: True)
    with decentral.join(rule=rule) as fleet:
        return train(fleet.attach(model, optimizer).step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("work", [autocast, scaled, accumulated, clipped])
def test_between_rounds_a_loop_comes_to_its_own_bits(place: None, work: Work, dtype: torch.dtype) -> None:
    assert trained(made(dtype), work, NEVER) == trained(made(dtype), work, None)


def test_a_compiled_model_comes_to_its_own_bits(place: None) -> None:
    bare, joined = (torch.compile(made(), backend="aot_eager") for _ in range(2))
    assert trained(joined, accumulated, NEVER) == trained(bare, accumulated, None)


class Halves(SyncRule):
    """Halves parameters and running means every two steps, and notes the learning rate it is told."""

    async def run(self, peer: Peer) -> None:
        while await peer.train(2):
            RATES.append(peer.learning_rate(peer.step))
            peer.params.mul_(0.5)
            for name in (*peer.inner.momenta, *peer.inner.variances):
                peer.inner_state(name).mul_(0.5)


RATES: list[float] = []


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: Adam(parameters, lr=0.01, foreach=True),
        lambda parameters: AdamW(parameters, lr=0.01, fused=True, amsgrad=True),
    ],
    ids=["sgd", "adam", "fused adamw"],
)
def test_a_rule_changes_parameters_and_running_means_in_place(place: None, make: Callable[..., Optimizer]) -> None:
    by_hand, model = made(), made()
    expected, optimizer = make(by_hand.parameters()), make(model.parameters())
    kept = [parameter.data_ptr() for parameter in model.parameters()]
    RATES.clear()
    with decentral.join(rule=Halves()) as fleet:
        sync = fleet.attach(model, optimizer)
        for number, batch in enumerate(batches(4), 1):
            for each, steps in ((by_hand, expected), (model, optimizer)):
                torch.manual_seed(number)
                steps.zero_grad()
                each(batch).square().mean().backward()
                steps.step()
            if number % 2 == 0:
                with torch.no_grad():
                    for parameter in filter(lambda each: each.requires_grad, by_hand.parameters()):
                        parameter.mul_(0.5)
                        for name, value in expected.state[parameter].items():
                            if name != "step":
                                value.mul_(0.5)
            sync.step()
            assert flat(model) == flat(by_hand)
            for ours, theirs in zip(optimizer.state.values(), expected.state.values(), strict=True):
                assert all(ours[name].equal(theirs[name]) for name in theirs)
    assert [parameter.data_ptr() for parameter in model.parameters()] == kept
    assert [optimizer.param_groups[0]["lr"]] * 2 == RATES


class Nudges(SyncRule):
    """Adds a change to the parameters, every step, that is too small for bfloat16."""

    async def run(self, peer: Peer) -> None:
        while await peer.train(1):
            peer.params.add_(2**-10)


def test_small_changes_of_low_precision_parameters_add_up(place: None) -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)  # the next number above 1 is 1 + 2^-7
    with decentral.join(rule=Nudges()) as fleet:
        sync = fleet.attach(model, SGD(model.parameters(), lr=0.1))
        seen = []
        for _ in range(16):
            sync.step()
            seen.append(model.weight.item())
    assert seen[:3] == [1.0] * 3
    assert seen[15] == 1 + 2**-6


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (DDP(), "'ddp' cannot run beside a training loop of your own: it asks for gradients"),
        (SingleMerge(), "rule.merge_at_end: the merged model's batch normalisation"),
    ],
)
def test_rules_that_cannot_are_refused_when_the_model_is_attached(place: None, rule: SyncRule, words: str) -> None:
    model = made()
    with pytest.raises(ConfigError, match=words), decentral.join(rule=rule, workers=2) as fleet:
        fleet.attach(model, SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("field", ["leases", "checkpoint.url", "parity.workers", "real.min_workers"])
def test_what_a_loop_cannot_do_is_refused(place: None, field: str) -> None:
    section, _, leaf = field.partition(".")
    table = {section: {leaf: "runs/x" if leaf == "url" else 2}} if leaf else {section: True}
    model = made()
    with pytest.raises(ConfigError, match=f"{field}: not for a training loop"), decentral.join(table) as fleet:
        fleet.attach(model, SGD(model.parameters(), lr=0.1))


def test_who_stays_alone_says_for_whom_it_waits_and_gives_up(
    place: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(coordination, "WAITING_S", (0.3, 30.0))
    model = made()
    run = {"real": {"start_timeout_s": 0.5}}
    with pytest.raises(RunError, match="did not answer 'join'"), decentral.join(run, workers=2) as fleet:
        fleet.attach(model, SGD(model.parameters(), lr=0.1))
    assert "waits for workers [1] of 2" in caplog.text


def test_a_loop_that_never_steps_is_told_so(place: None, caplog: pytest.LogCaptureFixture) -> None:
    model = made()
    with decentral.join(workers=1) as fleet:
        sync = fleet.attach(model, SGD(model.parameters(), lr=0.1))
        sync.step()
    assert not caplog.text
    with decentral.join(workers=1) as fleet:
        fleet.attach(model, SGD(model.parameters(), lr=0.1))
    assert "worker 0 leaves without one sync.step()" in caplog.text


def test_losses_that_a_loop_tells_are_in_the_journal_and_on_the_page(place: None, tmp_path: Path) -> None:
    model, same = made(), torch.zeros((), dtype=torch.bfloat16, requires_grad=True)
    with decentral.join(rule=DiLoCo(period=3), out=tmp_path) as fleet:
        sync = fleet.attach(model, SGD(model.parameters(), lr=0.1))
        for loss in (256.0, 1.0, 1.0):
            with torch.no_grad():
                sync.step(same.fill_(loss))  # 258 has too many digits for bfloat16
        for plain in (None, 2.0, 4.0):
            sync.step(plain)
        for _ in range(3):
            sync.step()
        sync.step(torch.tensor([[torch.inf]]))
    phases = [record for record in read_journal(tmp_path / "journal.jsonl") if isinstance(record, Trained)]
    assert [(phase.step, phase.loss) for phase in phases] == [(3, 86.0), (6, 3.0), (9, None), (10, torch.inf)]
    shown = page(read_runs([tmp_path]))
    assert "from 86 to 3." in shown
    assert "1 local phases had a loss that is not a finite number" in shown


def test_a_loss_of_several_numbers_is_refused(place: None) -> None:
    model = made()
    with pytest.raises(ConfigError, match=r"a tensor of shape \[8\]; give one number"), decentral.join() as fleet:
        fleet.attach(model, SGD(model.parameters(), lr=0.1)).step(torch.zeros(8))


def test_a_port_in_use_is_named(place: None) -> None:
    model = made()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RunError, match=f"cannot listen at {address}"), decentral.join(address=address) as fleet:
            fleet.attach(model, SGD(model.parameters(), lr=0.1))


def test_a_foreign_optimizer_or_dtype_is_refused(place: None) -> None:
    model, other = made(), copy.deepcopy(made())
    with pytest.raises(TaskError, match="has none of the model's"), decentral.join() as fleet:
        fleet.attach(model, SGD(other.parameters(), lr=0.1))
    double = nn.Linear(1, 1, dtype=torch.float64)
    with pytest.raises(TaskError, match=r"parameter 'weight' is torch.float64"), decentral.join() as fleet:
        fleet.attach(double, SGD(double.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="use the fleet in a with block"):
        decentral.join().attach(model, SGD(model.parameters(), lr=0.1))


def test_the_first_fsdp_is_refused(place: None, tmp_path: Path) -> None:
    """Its parameters are a rank's shards, and look like whole ones."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/site", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(nn.Linear(2, 2), use_orig_params=True, device_id=torch.device("cpu"))
        with pytest.raises(TaskError, match=r"shard it by fully_shard \(FSDP2\)"), decentral.join() as fleet:
            fleet.attach(model, SGD(model.parameters(), lr=0.1), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
