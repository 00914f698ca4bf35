"""Run papers' headline claims at small scale: `python -m examples.papers [NAME ...] [--seeds N] [--json]`."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from examples.papers.averaging import mt_dao, qsr, single_merge
from examples.papers.outer import co2, noloco, sparse_loco, streaming_diloco
from examples.papers.runner import Claim, judge, verdict_table
from examples.papers.unequal import async_local_sgd, dbw, gradient_coding, modest

CLAIMS = (
    Claim(
        "streaming_diloco",
        "Streaming DiLoCo, arXiv 2501.18512",
        "DiLoCo's loss with E3M0 at 1/8 of the bytes and a far lower peak",
        streaming_diloco,
    ),
    Claim("noloco", "NoLoCo, arXiv 2506.10911", "DiLoCo's loss at equal rounds, without all-reduce", noloco),
    Claim(
        "single_merge",
        "Single global merging, arXiv 2507.06542",
        "one merge at the end recovers the all-reduce's accuracy under skewed labels; the locals do not",
        single_merge,
    ),
    Claim(
        "async_local_sgd",
        "Asynchronous Local-SGD, arXiv 2401.09135",
        "delayed Nesterov with DyLU beats naive asynchrony, and matches DiLoCo per update and beats it in time",
        async_local_sgd,
    ),
    Claim("qsr", "QSR, arXiv 2310.14423", "fewer rounds than constant H, and a better model", qsr),
    Claim("mt_dao", "MT-DAO, arXiv 2510.05361", "DDP's loss at a tenth of the bytes; local Adam lags", mt_dao),
    Claim("co2", "CO2, arXiv 2401.16265", "full overlap: no waiting, and the loss of the synchronous form", co2),
    Claim(
        "gradient_coding",
        "Gradient coding, arXiv 1612.03301",
        "DDP's steps without waiting for stragglers",
        gradient_coding,
    ),
    Claim("dbw", "Dynamic backup workers, arXiv 2004.14696", "less time to a loss where one straggles", dbw),
    Claim("modest", "MoDeST, arXiv 2302.13837", "training goes on when 80 % of the nodes crash", modest),
    Claim("sparse_loco", "SparseLoCo, arXiv 2508.15706", "better than DiLoCo at equal bytes", sparse_loco),
)


def main() -> None:
    """Run the claims named, or all, and print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m examples.papers", description=__doc__)
    names = [claim.name for claim in CLAIMS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"claims to run (all): {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="run each under the seeds 0 to N - 1 (3)")
    parser.add_argument("--json", action="store_true", help="print JSON, a line a claim")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in names]:
        parser.error(f"no claim is called {', '.join(unknown)}; there are {', '.join(names)}")
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: at least 1")
    verdicts = []
    for claim in CLAIMS:
        if arguments.names and claim.name not in arguments.names:
            continue
        verdicts.append(judge(claim, range(arguments.seeds)))
        if arguments.json:
            print(json.dumps(verdicts[-1].to_table()), flush=True)
    if not arguments.json:
        Console().print(verdict_table(verdicts))


if __name__ == "__main__":
    main()
