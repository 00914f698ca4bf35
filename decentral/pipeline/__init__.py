"""Models too large for one worker: cut into stages, and batches that go through them."""

from decentral.pipeline.cut import Block, Cut, cut_of, survey
from decentral.pipeline.line import Line
from decentral.pipeline.measure import measure_blocks, measure_memory
from decentral.pipeline.memory import Stages, fitting_cuts
from decentral.pipeline.orders import ORDERS, Timetable, planned, timetable
from decentral.pipeline.paths import Action, Ground, Hop, Path, Paths, Permuted, Straight, Swapped
from decentral.pipeline.recovery import CheckFree, CheckFreePlus, Copy, FromStart, Neighbour, Recovery, Redundant
from decentral.pipeline.recut import Assembly, Move, OldStages, moves
from decentral.pipeline.settings import Pipeline
from decentral.pipeline.skipping import Skipping, placed
from decentral.pipeline.stage import PhantomStage, Stage, TorchStage

__all__ = [
    "ORDERS",
    "Action",
    "Assembly",
    "Block",
    "CheckFree",
    "CheckFreePlus",
    "Copy",
    "Cut",
    "FromStart",
    "Ground",
    "Hop",
    "Line",
    "Move",
    "Neighbour",
    "OldStages",
    "Path",
    "Paths",
    "Permuted",
    "PhantomStage",
    "Pipeline",
    "Recovery",
    "Redundant",
    "Skipping",
    "Stage",
    "Stages",
    "Straight",
    "Swapped",
    "Timetable",
    "TorchStage",
    "cut_of",
    "fitting_cuts",
    "measure_blocks",
    "measure_memory",
    "moves",
    "placed",
    "planned",
    "survey",
    "timetable",
]
