"""A run's metrics over HTTP for Prometheus: what a `Tally` knows, in the text exposition format.

Whoever reaches the port reads the metrics; there is no password. So they are served on the loopback interface unless
the run file names another host: in a trusted network alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from decentral.config import Real
from decentral.errors import RunError
from decentral.journal import Record
from decentral.workers.status import Status, Tally, WorkerStatus

See = Callable[[Record], None]

COUNTERS: dict[str, tuple[str, Callable[[WorkerStatus], float]]] = {
    "decentral_steps": ("Local steps trained on.", lambda worker: worker["steps_done"]),
    "decentral_samples": ("Samples trained on.", lambda worker: worker["samples"]),
    "decentral_sent_bytes": ("Bytes sent in the worker's present life.", lambda worker: worker["sent_bytes"]),
    "decentral_received_bytes": ("Bytes received in the present life.", lambda worker: worker["received_bytes"]),
}
GAUGES: dict[str, tuple[str, Callable[[WorkerStatus], float | None]]] = {
    "decentral_worker_up": ("1 while the worker is in the run.", lambda worker: worker["state"] == "training"),
    "decentral_loss": ("Training loss of the last local phase.", lambda worker: worker["loss"]),
    "decentral_step_seconds": ("Median time of a recent local step.", lambda worker: worker["step_s"]),
    "decentral_round_seconds": ("Time from the end of one round to that of the last.", lambda w: w["last_round_s"]),
}


class RunCollector:
    """Keeps a run's tally, and gives Prometheus its metrics whenever that asks, from a thread of its own."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._lock = threading.Lock()

    def see(self, record: Record) -> None:
        """Take in a record."""
        with self._lock:
            self._tally.see(record)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as of now."""
        with self._lock:
            status = self._tally.status("")
        yield from _families(status)


@contextmanager
def metrics_served(real: Real, on_record: See | None) -> Iterator[See | None]:
    """Serve metrics as the run file says; yields what is to see every record. Raises `RunError`: a port in use."""
    if not real.metrics_port:
        yield on_record
        return
    collector, registry = RunCollector(), CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(real.metrics_port, real.metrics_host, registry)
    except OSError as error:
        raise RunError(
            f"real.metrics_port = {real.metrics_port} on {real.metrics_host}: cannot be listened on "
            f"({error.strerror or error}); take another port, or 0 for no metrics"
        ) from error

    def see(record: Record) -> None:
        collector.see(record)
        if on_record is not None:
            on_record(record)

    try:
        yield see
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _families(status: Status) -> Iterator[Metric]:
    for name, (text, count) in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["worker"])
        for worker in status["workers"]:
            counter.add_metric([str(worker["worker"])], count(worker))
        yield counter
    for name, (text, measure) in GAUGES.items():
        gauge = GaugeMetricFamily(name, text, labels=["worker"])
        for worker in status["workers"]:
            value = measure(worker)
            if value is not None:
                gauge.add_metric([str(worker["worker"])], value)
        yield gauge
    yield from _labelled(status)


def _labelled(status: Status) -> Iterator[Metric]:
    """Yield the metrics that have a label besides the worker."""
    activities = CounterMetricFamily(
        "decentral_activity_seconds", "Time by what the worker did in its present life.", labels=["worker", "activity"]
    )
    rounds = CounterMetricFamily("decentral_rounds", "Rounds by what they came to.", labels=["worker", "outcome"])
    slow = GaugeMetricFamily(
        "decentral_slow_ratio", "How many times as long as others a slow worker takes.", labels=["worker", "cause"]
    )
    for worker in status["workers"]:
        number = str(worker["worker"])
        for activity, seconds in worker["seconds"].items():
            activities.add_metric([number, activity], seconds)
        for outcome, count in worker["round_outcomes"].items():
            rounds.add_metric([number, outcome], count)
        if worker["slow"] is not None and worker["times"] is not None:
            slow.add_metric([number, worker["slow"]], worker["times"])
    held_out = GaugeMetricFamily("decentral_held_out", "Held-out metrics as last evaluated.", labels=["metric"])
    for metric, value in status["metrics"].items():
        held_out.add_metric([metric], value)
    yield from (activities, rounds, slow, held_out)
