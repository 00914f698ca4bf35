"""What a run came to, as numbers and as a table."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from decentral.config import Run
from decentral.outcome import Outcome
from decentral.task import Task

JOULES_PER_KWH = 3.6e6


def summarize(run: Run, task: Task, outcome: Outcome) -> dict[str, Any]:
    """Return the run's figures as JSON-able fields: metrics, samples, seconds, and each worker's accounts.

    A worker that the run had before it went on with fewer has no speed.
    """
    parameters = outcome.totals.parameters
    groups = run.fleet.each()
    return {
        "rule": run.rule.to_table(),
        "headline": task.headline,
        "before": outcome.before,
        "after": outcome.after,
        "parameters": parameters,
        "samples": outcome.samples(),
        "seconds": outcome.seconds,
        "data_parallel_bytes": data_parallel_bytes(parameters, run.fleet.size, run.steps),
        "round_outcomes": dict(outcome.totals.rounds),
        "workers": [
            {
                "worker": left.worker,
                "speed": groups[left.worker].speed if left.worker < len(groups) else None,
                "reason": left.reason,
                "steps": left.step,
                "sent_bytes": left.sent_bytes,
                "received_bytes": left.received_bytes,
                "seconds": left.seconds,
            }
            for left in outcome.left()  # once for each time it was there
        ],
        **({} if outcome.accounts is None else {"accounts": outcome.accounts.to_fields()}),
    }


def data_parallel_bytes(parameters: int, workers: int, steps: int) -> int:
    """Return what each worker of float32 data-parallel training sends: 2 (n - 1) / n of the gradient in every step."""
    return round(2 * (workers - 1) / workers * 4 * parameters * steps)


def summary_table(summary: dict[str, Any]) -> Table:
    """Return the run's closing table."""
    headline = summary["headline"]
    title = f"{summary['rule']['name']}: {summary['samples']:,} samples in {summary['seconds']:.1f} s"
    if summary["after"]:
        title += f", held-out {headline} {summary['before'][headline]:.3f} -> {summary['after'][headline]:.3f}"
    accounts = summary.get("accounts", {})
    caption = "\n".join([_rounds(summary["round_outcomes"]), *_totals(accounts)])
    costs = {account["worker"]: _cost(account) for account in accounts.get("workers", ())}
    priced = any(costs.values())  # then the table is as wide as a usual terminal, with narrower gaps
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=priced)
    for column in ("worker", "steps", "sent", "data-\nparallel", "compute", "talk", "wait", *["cost"] * priced, "end"):
        table.add_column(column, justify="left" if column == "end" else "right")
    for worker in summary["workers"]:
        table.add_row(
            str(worker["worker"]) if worker["speed"] is None else f"{worker['worker']} at {worker['speed']:g}",
            str(worker["steps"]),
            size_text(worker["sent_bytes"]),
            size_text(summary["data_parallel_bytes"]),
            *(f"{worker['seconds'][kind]:.1f} s" for kind in ("compute", "talk", "wait")),
            *[costs.pop(worker["worker"], "")] * priced,  # of all its stays
            worker["reason"],
        )
    return table


def size_text(nbytes: float) -> str:
    """Return a number of bytes for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def _cost(account: dict[str, Any]) -> str:
    """Return what a worker and its traffic cost, as far as prices are known; empty if none is."""
    known = [account[part] for part in ("dollars", "egress_dollars") if account[part] is not None]
    return dollars_text(sum(known)) if known else ""


def _totals(accounts: dict[str, Any]) -> list[str]:
    """Return a line with the run's goodput and, as far as they are known, its cost and energy."""
    parts = []
    if accounts.get("goodput") is not None:
        parts.append(f"goodput {accounts['goodput']:.0%}")
    if accounts.get("dollars") is not None:
        parts.append(f"machines {dollars_text(accounts['dollars'])}")
    if accounts.get("egress_dollars") is not None:
        parts.append(f"egress {dollars_text(accounts['egress_dollars'])}")
    if accounts.get("joules") is not None:
        parts.append(f"energy {accounts['joules'] / JOULES_PER_KWH:.3g} kWh")
    return [", ".join(parts)] if parts else []


def dollars_text(amount: float) -> str:
    """Return an amount of money to the cent, a small one to two digits."""
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.2g}"


def _rounds(outcomes: dict[str, int]) -> str:
    if not outcomes:
        return "no rounds"
    return "worker-rounds " + ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
