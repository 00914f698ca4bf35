"""EXO Gym's side of `benchmarks.diloco_or_fedavg`; runs in EXO Gym's environment.

Arguments: seed, and "fedavg", "diloco" or "patched". Prints the held-out loss of the nodes' mean as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile

import torch
from exogym.strategy.diloco import DiLoCoCommunicator, DiLoCoStrategy
from exogym.strategy.federated_averaging import FedAvgStrategy
from exogym.strategy.optim import OptimSpec
from exogym.trainer import Trainer
from exogym_rules import Rows
from side import held_out_loss
from work import BATCH, HELD_OUT, LR, NODES, PERIOD, STEPS, data_of, model_of

MORE = 1
"""EXO Gym's rounds come after 11, 21, ... steps, so it does one step more for as many rounds."""

if sys.argv[2:] == ["patched"]:  # nodes import this module anew, with the same arguments

    def copy_of_master(self: DiLoCoCommunicator, model: torch.nn.Module) -> None:
        """Give the node a copy of the outer model, where EXO Gym gives it the outer model's own storage."""
        outer = self.master_model.state_dict()
        for name, parameter in model.named_parameters():
            parameter.data = outer[name].data.to(parameter.device, copy=True)

    DiLoCoCommunicator._synchronize_master_model = copy_of_master


def main() -> None:
    seed, rule = int(sys.argv[1]), sys.argv[2]
    optimizer = OptimSpec(torch.optim.AdamW, lr=LR["gpt"])
    kind = FedAvgStrategy if rule == "fedavg" else DiLoCoStrategy
    samples = (STEPS["gpt"] + MORE) * BATCH["gpt"] * NODES
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.chdir(folder)
        train, held_out = data_of("gpt", samples, seed=3 + 10 * seed), data_of("gpt", HELD_OUT, seed=9)
        model = Trainer(model_of("gpt", seed), Rows(train), Rows(held_out)).fit(
            num_epochs=1,
            max_steps=STEPS["gpt"] + MORE,
            strategy=kind(optim_spec=optimizer, H=PERIOD),
            num_nodes=NODES,
            device="cpu",
            batch_size=BATCH["gpt"],
            minibatch_size=BATCH["gpt"],
            val_size=HELD_OUT,
            val_interval=STEPS["gpt"] + MORE,
            disable_logging=True,
        )
    print(json.dumps(held_out_loss(model)))


if __name__ == "__main__":
    main()
