"""Pages on all parts that a run file names: rules, and everything that rules and runs are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from decentral.errors import ConfigError
from decentral.part import Part
from decentral.protocols import RULES, SyncRule
from website.families import FAMILIES, Family
from website.fields import fields_table
from website.tables import code, gist, prose, table
from website.traffic import WORKERS, bytes_sent

RULES_INTRO = f"""# Every rule

A rule's name goes into the run file, `rule = "diloco"`, or with fields that differ from their defaults,
`rule = {{name = "diloco", period = 100}}`. In equations, i and j are workers, theta parameters, `<-` an assignment.

All as it is with the defaults. *Sends*: bytes that a worker sends for each parameter in a local step, with {WORKERS}
workers; counted when this page was made, in a simulation of the rule's own messages. *Can*: *newcomers*, a worker may
come into a run that has begun; *checkpoints*, a run goes on from the middle; *leases*, each sample is accounted for
([samples](samples.md)); *stages*, it synchronises models cut into stages ([pipelines](pipelines.md)); *own loop*, it
runs under `decentral.join` ([your loop](your_loop.md)).
"""
PARTS_INTRO = """# Parts by name

Wherever a run file asks for one of these it takes a name, a table with `name` and the part's fields, or `module:Class`
for a part of your own: `inner = "adamw"`, `inner = {name = "adamw", lr = 1e-3}`. From Python they are classes with the
same fields.
"""


def parts_page() -> str:
    """Return the page on everything that is chosen by name and has no page of its own."""
    families = (family for family in FAMILIES if family.page == "parts.md")
    return "\n".join([PARTS_INTRO, *(_family(family) for family in families)])


def rules_page() -> str:
    """Return the page on every built-in rule: what it does, by which equations and which paper, and its fields."""
    rules = sorted(RULES.items())
    head = ("name", "what it does", "sends", "can")
    rows = ((f"[{code(name)}](#{name})", gist(rule), f"{bytes_sent(rule()):.2g}", _can(rule())) for name, rule in rules)
    return "\n".join([RULES_INTRO, table(head, rows), *(described_part(name, rule, 2) for name, rule in rules)])


def described_part(name: str, part: type[Part], level: int) -> str:
    """Return the description of one part below a heading of this level: where its class is, docstring, fields."""
    place = f"{part.__module__.rpartition('.')[0]}.{part.__name__}"
    return "\n".join([f"{'#' * level} {code(name)}\n", f"{code(place)}\n", prose(part), fields_table(part)])


def _can(rule: SyncRule) -> str:
    """Return what the rule does not refuse."""
    checks: dict[str, Callable[[], None]] = {
        "newcomers": rule.check_newcomers,
        "checkpoints": rule.check_checkpoints,
        "leases": partial(rule.check_leases, bounded=False),
        "stages": rule.check_stages,
        "own loop": partial(rule.check_own_loop, norms=False, endless=False),
    }
    return ", ".join(word for word, check in checks.items() if _passes(check))


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except ConfigError:
        return False
    return True


def _family(family: Family) -> str:
    parts = (described_part(name, cls, 3) for name, cls in family.known.items())
    return "\n".join([f"## {family.title}\n", prose(family.base), *parts])
