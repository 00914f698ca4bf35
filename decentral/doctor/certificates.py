"""Whether every node has certificates that fit, if the run wants them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from decentral.config import Run
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding
from decentral.errors import ConfigError
from decentral.workers import certs


class CertificateFiles(Check):
    name = "certificates"

    def look(self, run: Run) -> Seen:
        if run.real.certificates is None:
            return {}
        try:
            certs.read(run.real.certificates)
        except ConfigError as error:
            return {"error": str(error)}
        return {}

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        if run.real.certificates is None:
            if len(nodes) > 1:
                yield self.warning(
                    "none: what workers send, the run's secret too, can be read on the way",
                    "fine within one private network; else `decentral certs` makes some, for real.certificates",
                )
            return
        broken = [seen["error"] for seen in nodes.values() if "error" in seen]
        for error in broken:
            yield self.problem(error, "copy the folder that `decentral certs` made to every machine")
        if not broken:
            yield self.ok(f"good on {len(nodes)} nodes")
