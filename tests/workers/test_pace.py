"""How fast bytes may go. The clock is the simulator's, so that times are exact."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from decentral.config import validated
from decentral.sim.clock import VirtualLoop
from decentral.workers.pace import LEEWAY_S, Flow, Pace
from decentral.workers.worker import pace_of

CHUNK = 100_000
RATE = 80e6  # bits per second: a chunk takes 10 ms


def seconds(main: Coroutine[Any, Any, None]) -> float:
    """Return how long it takes in virtual time."""
    loop = VirtualLoop()
    try:
        began = loop.time()
        loop.run_until_complete(main)
        return loop.time() - began
    finally:
        loop.close()


async def pass_(flow: Flow, chunks: int) -> None:
    for _ in range(chunks):
        await flow.take(CHUNK)


def test_a_packet_takes_size_over_rate_however_long_the_link_was_idle() -> None:
    async def main() -> None:
        pace = Pace(up_bps=RATE)
        for idle_s in (0.0, 5.0):
            await asyncio.sleep(idle_s)
            await pass_(pace.sending(), 20)

    assert seconds(main()) == pytest.approx(5.0 + 2 * 0.2)


def test_packets_share_a_link_and_directions_do_not() -> None:
    async def main() -> None:
        pace = Pace(up_bps=RATE, down_bps=RATE / 2)
        await asyncio.gather(
            *[pass_(pace.sending(), 10) for _ in range(3)],
            *[pass_(pace.receiving(), 10) for _ in range(2)],
        )

    assert seconds(main()) == pytest.approx(max(3 * 10 * 0.01, 2 * 10 * 0.02))


def test_a_packet_that_was_held_up_catches_up_but_not_on_all_of_it() -> None:
    async def main() -> None:
        flow = Pace(up_bps=RATE).sending()
        await pass_(flow, 10)
        await asyncio.sleep(1.0)
        await pass_(flow, 10)

    assert seconds(main()) == pytest.approx(0.1 + 1.0 + 0.1 - LEEWAY_S)


def test_streams_make_way_only_while_the_worker_trains() -> None:
    async def main() -> None:
        pace = Pace(training_bps=RATE)
        await pass_(pace.receiving(), 100)  # takes no time
        pace.training = True
        await asyncio.gather(pass_(pace.sending(), 20), pass_(pace.receiving(), 20))
        pace.training = False
        await pass_(pace.sending(), 100)

    assert seconds(main()) == pytest.approx(0.2)


def test_what_a_newcomer_waits_for_makes_no_way_for_training_but_keeps_to_the_link() -> None:
    async def main(pace: Pace) -> None:
        pace.training = True
        await pass_(pace.sending(makes_way=False), 20)

    assert seconds(main(Pace(training_bps=RATE))) == 0.0
    assert seconds(main(Pace(up_bps=RATE, training_bps=RATE / 10))) == pytest.approx(0.2)


def test_chunks_are_small_on_a_slow_link() -> None:
    assert Pace().chunk_bytes(1 << 20) == 1 << 20
    assert Pace(up_bps=100e6).chunk_bytes(1 << 20) == 62_500
    assert Pace(up_bps=100e9).chunk_bytes(1 << 20) == 1 << 20
    assert Pace(up_bps=1e3).chunk_bytes(1 << 20) == 1 << 14


def test_the_run_file_sets_the_pace_of_each_worker() -> None:
    fleet = {
        "up_bps": RATE,
        "down_bps": 2 * RATE,
        "latency_s": 0.25,
        "workers": [{}, {"up_bps": RATE / 4, "down_bps": RATE / 2}],
    }

    async def times(pace: Pace) -> None:
        loop = asyncio.get_running_loop()
        for begin in (pace.sending, pace.receiving):
            began = loop.time()
            await pass_(begin(), 8)
            found.append(loop.time() - began)

    for shape_links, worker, expected in ((True, 0, [0.08, 0.04]), (True, 1, [0.32, 0.16]), (False, 1, [0.0, 0.0])):
        run = validated({"fleet": fleet, "real": {"shape_links": shape_links, "stream_bps": 0}}, "test")
        found: list[float] = []
        seconds(times(pace_of(run, worker)))
        assert found == pytest.approx(expected)
        assert pace_of(run, worker).latency_s == (0.25 if shape_links else 0.0)
