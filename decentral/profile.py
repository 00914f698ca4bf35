"""Measure this machine, for a fleet that looks like it: a local step, what coding takes, and what a link carries.

A step is the real one: the run's task, inner optimiser, batch size and threads. What is coded is coded by the rule's
codec. The link is measured with the transport that workers use, gRPC and all, so the figure is what a worker's streams
get, not what the wire could carry.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tomli_w
import torch

from decentral.config import Run
from decentral.errors import PeerGone, RunError
from decentral.fleet.devices import device_named
from decentral.pipeline import fitting_cuts, measure_blocks, measure_memory
from decentral.pipeline.memory import GIB, memory_bytes
from decentral.replica import TorchReplica
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers import rpc
from decentral.workers.buffers import prepare_memory
from decentral.workers.transport import Contact, Transport

WARM_UP_STEPS = 3
FEWEST_STEPS, MOST_STEPS = 10, 200
MEASURED_S = 2.0
"""Steps are measured for about so long, within the bounds above."""

CODED_ELEMENTS = 1 << 18
"""Elements that are coded at a time: a member's chunk of a segment among eight."""
CODED = 30
"""Times that they are coded."""
PAUSE_S = 0.02
"""Pause before each, as packets have them between each other: right after it a core takes about twice as long."""

PINGS = 20
FIRST_PACKET_BYTES, LARGEST_PACKET_BYTES = 1 << 20, 1 << 28
LONG_TRANSFER_S = 0.5
"""Packets are doubled until one takes so long: then starting up and latency do not show."""
REPEATS = 3

PROBER, LISTENER = 0, 1


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Local steps as measured: the median in seconds, and the standard deviation of their logarithms."""

    median_s: float
    jitter: float
    steps: int
    device: str


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """One direction of a link: bits per second of payload, one-way latency in seconds (half a round trip)."""

    bps: float
    latency_s: float


def measure_steps(run: Run) -> StepTimes:
    """Return how long local steps of the run take here, on a GPU if there is one. Raises `TaskError`.

    Sets the number of torch's threads to `run.real.threads`, and keeps freed memory, as a worker's process does.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _be_like_a_worker(run)
    replica = TorchReplica(
        run.make_task(),
        run.inner,
        worker=0,
        seed=run.seed,
        batch_size=run.batch_size,
        total_steps=run.steps,
        device=device,
    )
    replica.train(0, WARM_UP_STEPS)
    taken: list[float] = []
    while len(taken) < FEWEST_STEPS or (sum(taken) < MEASURED_S and len(taken) < MOST_STEPS):
        began = time.perf_counter()
        replica.train(WARM_UP_STEPS + len(taken), 1)  # returns the loss, so a GPU has done the step
        taken.append(time.perf_counter() - began)
    return StepTimes(
        median_s=statistics.median(taken),
        jitter=statistics.stdev(math.log(seconds) for seconds in taken),
        steps=len(taken),
        device=torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {run.real.threads} threads",
    )


def measure_cuts(run: Run) -> tuple[int, ...]:
    """Return the `pipeline.cuts` with which the slowest stage is the fastest, by what blocks take and remember here.

    Stages fit into the devices that `fleet.workers` names, or else into this machine's. Raises `TaskError` and
    `ConfigError` for a model that cannot be cut into so many stages, or of which no cuts fit.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _be_like_a_worker(run)
    task, pipeline = run.make_task(), run.pipeline
    samples = run.batch_size // pipeline.microbatches
    here = memory_bytes(device)
    room = [here if group.device is None else GIB * device_named(group.device).memory_gib for group in run.fleet.each()]
    return fitting_cuts(
        pipeline,
        task,
        run.seed,
        run.batch_size,
        run.inner,
        [min(room[stage :: pipeline.stages]) for stage in range(pipeline.stages)],
        seconds=measure_blocks(task, run.seed, samples, device),
        remembers=measure_memory(task, run.seed, samples, device),
    )


async def measure_coding(run: Run) -> float | None:
    """Return how many bits of float32 a second the rule's codec encodes, and decodes, here, on a GPU if there is one.

    It is done in a thread of its own, as workers do. None if nothing is coded beside the wire, or if the codec
    remembers: what that takes depends on the rounds before.
    """
    codec = getattr(run.rule, "codec", None)
    if codec is None or codec.loss == "none" or codec.shaped or codec.coder(lambda _name, like: like) is not None:
        return None
    _be_like_a_worker(run)
    values = torch.randn(CODED_ELEMENTS, device="cuda" if torch.cuda.is_available() else "cpu")
    taken: list[float] = []
    with ThreadPoolExecutor(1) as thread:
        for _ in range(CODED):
            await asyncio.sleep(PAUSE_S)
            began = time.perf_counter()
            await asyncio.get_running_loop().run_in_executor(thread, codec.round_trip, values)
            taken.append(time.perf_counter() - began)
    return 2 * 32 * CODED_ELEMENTS / statistics.median(taken)


async def measure_link(address: str, keys: rpc.Keys, patience_s: float) -> LinkSpeed:
    """Return what packets to the listener at `address` (host:port) get. Raises `RunError` if it cannot be reached."""
    transport = Transport(Discard(), keys=keys, max_packet_bytes=0, patience_s=patience_s)
    transport.admit({LISTENER: Contact(0, address)})
    try:
        await _seconds(transport, 0)  # dialling
        trips = [await _rested(transport) for _ in range(PINGS)]
        trip_s = statistics.median(trips)
        nbytes = FIRST_PACKET_BYTES
        while await _seconds(transport, nbytes) < LONG_TRANSFER_S and nbytes < LARGEST_PACKET_BYTES:
            nbytes *= 2
        transfers = [await _seconds(transport, nbytes) for _ in range(REPEATS)]
        return LinkSpeed(8 * nbytes / max(statistics.median(transfers) - trip_s, 1e-9), trip_s / 2)
    except PeerGone as error:
        raise RunError(
            f"{address}: {error}; is `decentral profile --listen` running there, with this secret and certificates?"
        ) from error
    finally:
        await transport.close()


async def measure_loopback(keys: rpc.Keys, patience_s: float) -> LinkSpeed:
    """Return what packets to another server in this very process get: what software alone allows."""
    listening = listener(keys, patience_s)
    try:
        return await measure_link(await listening.start("127.0.0.1"), keys, patience_s)
    finally:
        await listening.close()


async def listen(host: str, port: int, keys: rpc.Keys, patience_s: float, started: Callable[[str], None]) -> None:
    """Take what probers send, until cancelled; `started` is told the address. Raises `RunError` for a taken port."""
    listening = listener(keys, patience_s)
    try:
        started(await listening.start(host, port))
        await asyncio.Event().wait()
    finally:
        await listening.close()


def fleet_section(workers: int, steps: StepTimes, coding_bps: float | None, link: LinkSpeed) -> str:
    """Return the `[fleet]` section of a run file: so many machines like this one, behind links like this one."""
    fleet: dict[str, object] = {
        "step_time_s": _rounded(steps.median_s),
        "jitter": _rounded(min(steps.jitter, 2.0)),
        "up_bps": _rounded(link.bps),
        "down_bps": _rounded(link.bps),
        "latency_s": _rounded(link.latency_s),
        **({} if coding_bps is None else {"coding_bps": _rounded(coding_bps)}),
        "workers": [{"count": workers}],
    }
    return f"# {steps.steps} local steps on {steps.device}\n" + tomli_w.dumps({"fleet": fleet})


def _be_like_a_worker(run: Run) -> None:
    """Make of this process what `workers.actor` makes of a worker's."""
    prepare_memory()
    torch.set_num_threads(run.real.threads)


def _rounded(value: float) -> float:
    """Three digits: more is noise."""
    return float(f"{value:.3g}")


def listener(keys: rpc.Keys, patience_s: float) -> Transport:
    """Return a transport that takes what one prober sends, once it is started."""
    transport = Transport(Discard(), keys=keys, max_packet_bytes=LARGEST_PACKET_BYTES, patience_s=patience_s)
    transport.admit({PROBER: Contact(0, "")})
    return transport


async def _rested(transport: Transport) -> float:
    """Return how long a packet without payload takes there and back, after a pause."""
    await asyncio.sleep(PAUSE_S)
    return await _seconds(transport, 0)


async def _seconds(transport: Transport, nbytes: int) -> float:
    """Return how long it takes until the listener has so many bytes, and has said so."""
    packet = Packet("raw", 0, nbytes, torch.zeros(nbytes, dtype=torch.uint8))
    header = pack_header(Header(PROBER, 0, Tag("profile", 1), packet.codec, packet.numel, packet.nbytes, packet.weight))
    began = time.perf_counter()
    await transport.send(LISTENER, header, packet)
    return time.perf_counter() - began


class Discard:
    """Receives packets for their time alone."""

    def begin(self) -> None:
        pass

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None:
        pass

    def end(self) -> None:
        pass

    def refuse(self, source: int, error: FrameError) -> None:
        pass
