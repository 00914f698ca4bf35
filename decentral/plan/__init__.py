"""Which rule, settings and workers for these machines: found by simulating the candidates."""

from decentral.plan.plan import Plan, plan
from decentral.plan.wanted import Wanted
from decentral.plan.work import Work, work_of

__all__ = ["Plan", "Wanted", "Work", "plan", "work_of"]
