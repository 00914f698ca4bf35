"""EXO Gym's side of `benchmarks.exogym`; runs in EXO Gym's environment.

Arguments: "mlp" or "gpt". Prints the loss of each rule's averaged model as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile

import torch
from exogym.strategy.demo import DeMoStrategy
from exogym.strategy.diloco import DiLoCoStrategy
from exogym.strategy.federated_averaging import FedAvgStrategy
from exogym.strategy.optim import OptimSpec
from exogym.strategy.sparta import SPARTAStrategy
from exogym.strategy.strategy import SimpleReduceStrategy, Strategy
from exogym.trainer import Trainer
from work import BATCH, HELD_OUT, LR, NODES, PERIOD, RULES, SHARE, STEPS, data_of, model_of, samples


def strategy_of(rule: str, lr: float) -> Strategy:
    adamw = OptimSpec(torch.optim.AdamW, lr=lr)
    if rule == "ddp":
        return SimpleReduceStrategy(optim_spec=adamw)
    if rule == "fedavg":  # it does not pass its inner_optim on
        return FedAvgStrategy(optim_spec=adamw, H=PERIOD)
    if rule == "diloco":
        return DiLoCoStrategy(optim_spec=adamw, H=PERIOD)
    if rule == "sparta":
        return SPARTAStrategy(optim_spec=adamw, p_sparta=SHARE)
    return DeMoStrategy()


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """A dataset of columns: one is given as it is, several as a tuple."""

    def __init__(self, columns: tuple[torch.Tensor, ...]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> object:
        row = tuple(column[index] for column in self.columns)
        return row if len(row) > 1 else row[0]


def main() -> None:
    kind = sys.argv[1]
    losses = {}
    held_out = data_of(kind, HELD_OUT, seed=9)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.chdir(folder)
        for rule in RULES:
            trainer = Trainer(model_of(kind), Rows(data_of(kind, samples(kind), seed=3)), Rows(held_out))
            model = trainer.fit(
                num_epochs=1,
                max_steps=STEPS[kind],
                strategy=strategy_of(rule, LR[kind]),
                num_nodes=NODES,
                device="cpu",
                batch_size=BATCH[kind],
                minibatch_size=BATCH[kind],
                val_size=HELD_OUT,
                val_interval=STEPS[kind],
                disable_logging=True,
            )
            model.eval()
            with torch.no_grad():
                losses[rule] = float(model(held_out if len(held_out) > 1 else held_out[0]))
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
