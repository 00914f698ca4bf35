"""What a run takes at least, told without simulating it: so that what cannot be best need not be tried."""

from __future__ import annotations

from dataclasses import replace

from decentral.config import Run
from decentral.plan.forecast import Forecast
from decentral.plan.work import Work, dollars_per_s, step_s
from decentral.protocols import DDP
from decentral.sim.links import Links


def bound(run: Run, work: Work) -> Forecast:
    """Return what the run takes at least: its slowest machine's computing, or under `ddp` its slowest line's sending.

    Of n workers each sends 2 (n - 1) / n of the gradient in every step, whatever else it does.
    """
    whole = replace(work, run=run)
    step = max(step_s(whole))
    if isinstance(run.rule, DDP) and run.fleet.size > 1:
        share = 2 * (run.fleet.size - 1) / run.fleet.size
        slowest_bps = min(Links(run.fleet, run.seed, lambda: 0.0).up_bps)
        step = max(step, share * 8 * run.rule.codec.wire_bytes(work.parameters) / slowest_bps)
    seconds, price = run.steps * step, dollars_per_s(whole)
    dollars = None if price is None else seconds * price
    return Forecast(seconds=seconds, round_s=step, sent_bytes=0.0, computing=1.0, dollars=dollars)
