"""Models too large for one worker: cut into stages, and batches that go through them."""

from decentral.pipeline.cut import Block, Cut, cut_of, survey
from decentral.pipeline.line import Line
from decentral.pipeline.orders import ORDERS, Action
from decentral.pipeline.recovery import CheckFree, Copy, Neighbour, Recovery
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.stage import PhantomStage, Stage, TorchStage

__all__ = [
    "ORDERS",
    "Action",
    "Block",
    "CheckFree",
    "Copy",
    "Cut",
    "Line",
    "Neighbour",
    "PhantomStage",
    "Pipeline",
    "Recovery",
    "Stage",
    "TorchStage",
    "cut_of",
    "survey",
]
