"""Whether the ports that the run file names are free."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from decentral.config import Run
from decentral.doctor.check import Check, Seen
from decentral.doctor.finding import Finding


class Ports(Check):
    name = "ports"

    def look(self, run: Run) -> Seen:
        named = {"real.port": run.real.port, "real.metrics_port": run.real.metrics_port}
        return {f"{field} = {port}": _refusal(port) for field, port in named.items() if port}

    def judge(self, nodes: Mapping[str, Seen], run: Run) -> Iterator[Finding]:
        taken = False
        for node, ports in nodes.items():
            for port, refusal in ports.items():
                if refusal:
                    taken = True
                    yield self.problem(
                        f"{port} cannot be had on {node}: {refusal}",
                        "end what listens there (`ss -ltnp` names it), or name another port; a node on which neither "
                        "coordinator nor driver will be may ignore it",
                    )
        if not taken:
            named = sorted({port for ports in nodes.values() for port in ports})
            yield self.ok(f"{', '.join(named)}: free" if named else "the run file names none: any free ones are taken")


def _refusal(port: int) -> str:
    try:
        with socket.create_server(("", port)):
            return ""
    except OSError as error:
        return error.strerror or str(error)
