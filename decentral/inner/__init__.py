"""The inner optimiser: how one worker steps its flat parameters between two talks with others.

Optimisers run over ONE flat tensor [P] that holds all parameters of a replica, so a step is one fused operation.
"""

from __future__ import annotations

from decentral.inner.base import Coefficient, Fraction, Inner, Matrix
from decentral.inner.flat import Optimizer, set_steps_of, state_of, steps_of
from decentral.inner.fused import SGD, AdamW
from decentral.inner.multi_momentum import ADOPT, MultiMomentum, QHAdam
from decentral.inner.muon import Muon, orthogonalised

Inner.built_in.update({"sgd": SGD, "adamw": AdamW, "qhadam": QHAdam, "adopt": ADOPT, "muon": Muon})
INNER = Inner.built_in
"""The inner optimisers by the name that run files use."""

__all__ = [
    "ADOPT",
    "INNER",
    "SGD",
    "AdamW",
    "Coefficient",
    "Fraction",
    "Inner",
    "Matrix",
    "MultiMomentum",
    "Muon",
    "Optimizer",
    "QHAdam",
    "orthogonalised",
    "set_steps_of",
    "state_of",
    "steps_of",
]
