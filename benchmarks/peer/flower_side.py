"""Flower's app for `benchmarks.side_by_side`; runs in Flower's environment.

FedAvgM, whose server has the outer momentum. Flower starts the client anew for each round, so AdamW's state is kept
where Flower says: in the context's state.
"""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvgM
from side import OUTER, PERIOD, STEPS, Replica, held_out_loss, note_end
from work import model_of

client = ClientApp()
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    rank, replicas = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    replica = Replica(rank, replicas, Path(str(context.run_config["folder"])))
    replica.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    if "means" in context.state:
        _restore(replica, context.state)
    for _ in range(PERIOD):
        replica.train()
    _keep(replica, context.state)
    reply = {"arrays": ArrayRecord(replica.model.state_dict()), "metrics": MetricRecord({"num-examples": 1})}
    return Message(content=RecordDict(reply), reply_to=message)


def _keep(replica: Replica, state: RecordDict) -> None:
    means = {}
    for index, (_, kept) in enumerate(sorted(replica.optimizer.state_dict()["state"].items())):
        means |= {f"{index}.{name}": tensor for name, tensor in kept.items()}
    state["means"] = ArrayRecord(means)
    state["done"] = MetricRecord({"steps": replica.step})


def _restore(replica: Replica, state: RecordDict) -> None:
    whole = replica.optimizer.state_dict()
    for name, tensor in state["means"].to_torch_state_dict().items():
        index, mean = name.split(".")
        whole["state"].setdefault(int(index), {})[mean] = tensor
    replica.optimizer.load_state_dict(whole)
    replica.step = int(state["done"]["steps"])


@server.main()
def main(grid: Grid, context: Context) -> None:
    torch.set_num_threads(1)
    replicas = int(context.run_config["replicas"])
    model = model_of("gpt")
    strategy = FedAvgM(
        fraction_evaluate=0.0,
        min_available_nodes=replicas,
        server_learning_rate=OUTER["lr"],
        server_momentum=OUTER["momentum"],
    )
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=STEPS // PERIOD)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    note_end(Path(str(context.run_config["folder"])), 0, held_out_loss(model))
