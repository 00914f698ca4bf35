"""Hugging Face's own Trainer with a rule beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from processes import Crew, flat, free_address
from torch import Tensor
from torch.utils.data import IterableDataset
from trainers import BATCH, LONG_S, LR, PARTS, STEPS, Net, Never, as_ranks, as_workers, made, rows
from transformers import Trainer, TrainerCallback, TrainingArguments

import decentral
from decentral.config import Run
from decentral.embedded.hf import DecentralCallback
from decentral.protocols import DiLoCo


class InOrder(IterableDataset):  # type: ignore[type-arg]
    """Rows as they are, not shuffled."""

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([{"x": row} for row in self._samples])


def trainer_of(model: Net, samples: Tensor, fleet: Any, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=PARTS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **more,
    )
    callbacks = [] if fleet is None else [DecentralCallback(fleet)]
    return Trainer(model, arguments, train_dataset=InOrder(samples), eval_dataset=InOrder(rows(9)), callbacks=callbacks)


class Looks(TrainerCallback):
    """Has the parameters as the Trainer evaluates them."""

    def on_evaluate(self, *_arguments: Any, model: Net, **_others: Any) -> None:
        self.seen = flat(model)


def train(model: Net, samples: Tensor, fleet: Any) -> list[float]:
    """Return the parameters that the Trainer has evaluated at its last step."""
    trainer, looks = trainer_of(model, samples, fleet, eval_strategy="steps", eval_steps=STEPS), Looks()
    trainer.add_callback(looks)
    trainer.train()
    return looks.seen


def in_two_processes(place: dict[str, Any], _tell: Any, run: Run, elsewhere: list[str]) -> tuple[Any, Any]:
    answers = as_workers(place, run, train, elsewhere[0])
    AcceleratorState._reset_state(reset_partial_state=True)  # it knows for good whether a process is a rank
    return answers, as_ranks(place, train, elsewhere[1])


def test_two_trainers_are_two_workers_or_two_ranks_of_one() -> None:
    """Workers accumulate gradients, and the end cuts their last phase short."""
    elsewhere = [free_address(), free_address()]
    with Crew(in_two_processes, 2, Run(rule=DiLoCo(period=3)), elsewhere, long_s=LONG_S) as crew:
        crew.start(0, 1)
        (worker, ranks), (other_worker, other_ranks) = crew.answers()
    trained, evaluated, by_hand = worker
    assert trained == by_hand == other_worker[0] == other_worker[2]
    assert evaluated == trained, "the last round comes before the last evaluation"
    alone, joined = ranks
    assert alone == joined
    assert ranks == other_ranks


def test_between_rounds_a_trainer_in_mixed_precision_comes_to_its_own_bits(place: dict[str, Any]) -> None:
    alone, joined = made(), made()
    trainer_of(alone, rows(0), None, bf16=True).train()
    with decentral.join(rule=Never(), **place) as fleet:
        trainer_of(joined, rows(0), fleet, bf16=True).train()
    assert flat(joined) == flat(alone) != flat(made())


def test_the_trainer_stops_when_the_run_is_over(place: dict[str, Any]) -> None:
    model = made()
    with decentral.join({"steps": 5, "inner": {"name": "adamw", "lr": LR}}, **place) as fleet:
        trainer = trainer_of(model, rows(0), fleet)
        trainer.train()
    assert trainer.state.global_step == 5


class Breaks(TrainerCallback):
    def on_step_begin(self, *_arguments: Any, **_others: Any) -> None:
        raise ValueError("no more")


def test_what_breaks_the_trainer_comes_out_of_it(place: dict[str, Any]) -> None:
    fleet = decentral.join(**place)
    trainer = trainer_of(made(), rows(0), fleet)
    trainer.add_callback(Breaks())
    with pytest.raises(ValueError, match="no more"), fleet:
        trainer.train()
