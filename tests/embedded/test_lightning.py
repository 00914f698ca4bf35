"""Lightning's own Trainer with a rule beside it."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from processes import Crew, flat, free_address
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from trainers import BATCH, LONG_S, LR, PARTS, STEPS, Net, Never, as_ranks, as_workers, made, rows

import decentral
from decentral.config import Run
from decentral.embedded.lightning import DecentralCallback
from decentral.errors import TaskError
from decentral.journal import Trained, read_journal
from decentral.protocols import DiLoCo


class Module(LightningModule):  # type: ignore[misc]
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Tensor, _index: int) -> Tensor:
        return self.net(batch)["loss"]

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.parameters(), lr=LR, weight_decay=0.0)


class ByItself(Module):
    """Steps its optimizer itself, where `Module` leaves that to Lightning."""

    def __init__(self, net: Net) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        (self.net(batch)["loss"] / PARTS).backward()
        if index % PARTS == PARTS - 1:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Two(Module):
    def training_step(self, batch: Tensor, _index: int) -> None: ...

    def configure_optimizers(self) -> list[SGD]:
        return [SGD(self.parameters(), lr=LR), SGD(self.parameters(), lr=LR)]

    automatic_optimization = False


def trainer_of(fleet: Any, **more: Any) -> Trainer:
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "accumulate_grad_batches": PARTS, **more},
        callbacks=[] if fleet is None else [DecentralCallback(fleet)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def loader(samples: Tensor) -> DataLoader[Tensor]:
    return DataLoader(samples, batch_size=BATCH)  # type: ignore[arg-type]


def train(net: Net, samples: Tensor, fleet: Any) -> None:
    trainer_of(fleet).fit(Module(net), loader(samples))


def train_by_itself(net: Net, samples: Tensor, fleet: Any) -> None:
    trainer_of(fleet, accumulate_grad_batches=1).fit(ByItself(net), loader(samples))


def train_on_two_ranks(net: Net, samples: Tensor, fleet: Any) -> None:
    trainer_of(fleet, devices=2, strategy="ddp").fit(Module(net), loader(samples))


def in_two_processes(place: dict[str, Any], _tell: Any, run: Run, elsewhere: list[str]) -> list[Any]:
    itself = place | {"address": elsewhere[0]}
    return [
        as_workers(place, run, train, elsewhere[1]),
        as_workers(itself, run, train_by_itself, elsewhere[2]),
        as_ranks(place, train_on_two_ranks, elsewhere[3]),
    ]


def test_two_trainers_are_two_workers_or_two_ranks_of_one() -> None:
    """Workers accumulate gradients, one way or the other, and the end cuts their last phase short."""
    elsewhere = [free_address() for _ in range(4)]
    with Crew(in_two_processes, 2, Run(rule=DiLoCo(period=3)), elsewhere, long_s=LONG_S) as crew:
        crew.start(0, 1)
        (first, by_itself, ranks), (second, other, other_ranks) = crew.answers()
    trained, _, by_hand = first
    assert trained == by_hand
    assert first == second == by_itself == other
    alone, joined = ranks
    assert alone == joined
    assert ranks == other_ranks


def test_between_rounds_a_trainer_in_mixed_precision_comes_to_its_own_bits(place: dict[str, Any]) -> None:
    alone, joined = made(), made()
    trainer_of(None, precision="bf16-mixed").fit(Module(alone), loader(rows(0)))
    with decentral.join(rule=Never(), **place) as fleet:
        trainer_of(fleet, precision="bf16-mixed").fit(Module(joined), loader(rows(0)))
    assert flat(joined) == flat(alone) != flat(made())


def test_losses_are_those_of_optimizer_steps(place: dict[str, Any], tmp_path: Path) -> None:
    net, by_hand = made(), made()
    with decentral.join(rule=Never(), out=tmp_path, **place) as fleet:
        train(net, rows(0), fleet)
    losses: list[float] = []
    optimizer = AdamW(by_hand.parameters(), lr=LR, weight_decay=0.0)
    for parts in rows(0).view(STEPS, PARTS, BATCH, 6):
        loss = torch.stack([by_hand(part)["loss"] for part in parts]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    (phase,) = [record for record in read_journal(tmp_path / "journal.jsonl") if isinstance(record, Trained)]
    assert phase.steps == STEPS
    assert phase.loss == pytest.approx(mean(losses))


def test_the_trainer_stops_when_the_run_is_over(place: dict[str, Any]) -> None:
    with decentral.join({"steps": 5, "inner": {"name": "adamw", "lr": LR}}, **place) as fleet:
        trainer = trainer_of(fleet)
        trainer.fit(Module(made()), loader(rows(0)))
    assert trainer.global_step == 5


def test_several_optimizers_are_refused(place: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match="the module has 2 optimizers"), decentral.join(**place) as fleet:
        trainer_of(fleet, accumulate_grad_batches=1).fit(Two(made()), loader(rows(0)))
