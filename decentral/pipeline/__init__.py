"""Models too large for one worker: cut into stages, and batches that go through them."""

from decentral.pipeline.cut import Block, Cut, cut_of, survey
from decentral.pipeline.line import Line
from decentral.pipeline.orders import ORDERS, Action
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.stage import PhantomStage, Stage, TorchStage

__all__ = [
    "ORDERS",
    "Action",
    "Block",
    "Cut",
    "Line",
    "PhantomStage",
    "Pipeline",
    "Stage",
    "TorchStage",
    "cut_of",
    "survey",
]
