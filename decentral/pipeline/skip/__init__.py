"""Pipelines whose microbatches skip stages: which node holds which stage, and which path each microbatch takes.

After SkipPipe (Blagoev et al., *SkipPipe: Partial and Reordered Pipelining Framework for Training LLMs in Heterogeneous
Networks*, 2025, arXiv 2502.19913), by its published code; what differs is said where it does. Pure algorithms: `place`
gives nodes to stages, `search` finds paths, `replay` says how an iteration along them goes.
"""

from decentral.pipeline.skip.baselines import full, random_skip
from decentral.pipeline.skip.costs import Costs
from decentral.pipeline.skip.paths import SearchEffort, search
from decentral.pipeline.skip.placement import Placement, PlacementEffort, place
from decentral.pipeline.skip.replay import Replay, Visit, replay
from decentral.pipeline.skip.schedule import Microbatch, Schedule

__all__ = [
    "Costs",
    "Microbatch",
    "Placement",
    "PlacementEffort",
    "Replay",
    "Schedule",
    "SearchEffort",
    "Visit",
    "full",
    "place",
    "random_skip",
    "replay",
    "search",
]
