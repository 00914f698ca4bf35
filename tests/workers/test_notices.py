"""Preemption notices: each source against what it will meet, real signals, real HTTP and a real Ray."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from decentral.errors import ConfigError
from decentral.sim.clock import VirtualLoop
from decentral.workers.notices import SOURCES, Notice, NoticeSource, first_notice, listen, metadata, sources_named
from decentral.workers.notices.aws import AwsNotices, AwsRebalanceNotices
from decentral.workers.notices.azure import AzureNotices
from decentral.workers.notices.gcp import GcpNotices
from decentral.workers.notices.metadata import METADATA_URL, Absent, MetadataNotices, Unusable, ask
from decentral.workers.notices.sigterm import GRACE_S, SigtermNotices
from tests.workers.clouds import TROUBLES, Answer, Aws, Azure, Cloud, Gcp, Trouble, serving

T = TypeVar("T")


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a hundred times as often."""
    for pause in ("RETRY_S", "RETRY_MOST_S"):
        monkeypatch.setattr(metadata, pause, getattr(metadata, pause) / 100)
    for source in (AwsNotices, GcpNotices, AzureNotices):
        monkeypatch.setattr(source, "every_s", source.every_s / 100)


def within(seconds: float, coroutine: Coroutine[Any, Any, T]) -> T:
    """Return what the coroutine returns; raises `TimeoutError` if that takes longer."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


def heard(source: MetadataNotices) -> Notice:
    notice = within(10, source.wait())
    assert notice is not None
    return notice


async def asked_often(cloud: Cloud, times: int) -> None:
    while len(cloud.asked) < times:
        await asyncio.sleep(0.005)


# Amazon


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0, -3600.0])
def test_aws_two_minutes_are_two_minutes_whatever_our_clock_says(ahead_s: float) -> None:
    cloud = Aws(ahead_s)

    async def interrupted(url: str) -> Notice | None:
        waiting = asyncio.create_task(AwsNotices(url).wait())
        await asked_often(cloud, 4)  # a token, then three times 404
        assert not waiting.done()
        cloud.interrupt("terminate", 120)
        return await waiting

    with serving(cloud) as url:
        notice = within(10, interrupted(url))
    assert notice is not None
    assert (notice.source, notice.reason) == ("aws", "AWS will terminate this spot instance")
    assert 116 < notice.deadline_s <= 120  # both times are cut to seconds, and one may have passed


def test_aws_takes_a_new_token_when_the_old_one_has_expired() -> None:
    cloud = Aws(token_lasts=2)

    async def interrupted(url: str) -> Notice | None:
        waiting = asyncio.create_task(AwsNotices(url).wait())
        await asked_often(cloud, 9)
        cloud.interrupt("stop", 60)
        return await waiting

    with serving(cloud) as url:
        assert within(10, interrupted(url)) is not None
    assert sum(asked.method == "PUT" for asked in cloud.asked) >= 3


def test_an_aws_recommendation_sets_no_time_and_is_a_source_of_its_own() -> None:
    cloud = Aws()
    cloud.recommend()
    with serving(cloud) as url:
        notice = heard(AwsRebalanceNotices(url))
        assert (notice.source, notice.deadline_s) == ("aws-rebalance", math.inf)
        with pytest.raises(asyncio.TimeoutError):
            within(0.3, AwsNotices(url).wait())


# Google


def test_gcp_is_heard_while_the_server_holds_the_question() -> None:
    cloud = Gcp()

    async def preempted(url: str) -> Notice | None:
        waiting = asyncio.create_task(GcpNotices(url).wait())
        await asyncio.to_thread(cloud.polled.wait)
        cloud.preempt()
        return await waiting

    with serving(cloud) as url:
        notice = within(10, preempted(url))
    assert notice == Notice("gcp", 30.0, "Google Cloud preempts this machine")
    assert len(cloud.asked) == 2  # once for the ETag, once for the change


def test_gcp_misses_nothing_between_two_questions() -> None:
    cloud = Gcp()

    async def preempted(url: str) -> Notice | None:
        source = GcpNotices(url)
        assert await source.look() is None
        cloud.preempt()  # nobody is asking now; the ETag of the next question is an old one
        return await source.look()

    with serving(cloud) as url:
        assert within(10, preempted(url)) is not None
    assert not cloud.polled.is_set()


def test_a_machine_that_is_being_preempted_when_we_come_is_told_at_once() -> None:
    cloud = Gcp()
    cloud.preempt()
    with serving(cloud) as url:
        assert heard(GcpNotices(url)).deadline_s == 30.0


# Microsoft


@pytest.mark.parametrize("ahead_s", [0.0, 3600.0])
@pytest.mark.parametrize("kind", ["Preempt", "Terminate", "Reboot", "Redeploy"])
def test_azure_tells_of_our_machine_alone_and_of_what_ends_it(kind: str, ahead_s: float) -> None:
    cloud = Azure(ahead_s)
    cloud.schedule("neighbour", "Preempt", "vmss_0", 10)
    cloud.schedule("pause", "Freeze", "vmss_1", 10)

    async def evicted(url: str) -> Notice | None:
        source = AzureNotices(url)
        waiting = asyncio.create_task(source.wait())
        await asked_often(cloud, 4)
        assert not waiting.done()
        cloud.schedule("ours", kind, "vmss_1", 30)
        notice = await waiting
        assert cloud.started == []
        await source.ready()
        return notice

    with serving(cloud) as url:
        notice = within(10, evicted(url))
    assert notice is not None
    assert 26 < notice.deadline_s <= 30
    assert notice.reason == f"Azure has scheduled for this machine: {kind}"
    assert cloud.started == ["ours"]


def test_an_azure_event_that_has_begun_leaves_no_time() -> None:
    cloud = Azure()
    cloud.schedule("ours", "Preempt", "vmss_1", None)
    with serving(cloud) as url:
        assert heard(AzureNotices(url)).deadline_s == 0.0


def test_azure_need_not_hear_that_we_are_ready() -> None:
    cloud = Azure()
    cloud.schedule("ours", "Preempt", "vmss_1", 30)

    async def evicted(url: str, last_words: Trouble) -> None:
        source = AzureNotices(url)
        await source.ready()  # there is no event yet: nobody is asked
        assert cloud.asked == []
        await source.wait()
        cloud.trouble = [last_words]
        await source.ready()

    with serving(cloud) as url:
        within(10, evicted(url, TROUBLES["nothing"]))
    assert cloud.started == []


# What goes wrong


def interrupted_aws() -> tuple[Cloud, Callable[[], None]]:
    cloud = Aws()
    return cloud, lambda: cloud.interrupt("stop", 100)


def preempted_gcp() -> tuple[Cloud, Callable[[], None]]:
    cloud = Gcp()
    return cloud, cloud.preempt


def evicted_azure() -> tuple[Cloud, Callable[[], None]]:
    cloud = Azure()
    return cloud, lambda: cloud.schedule("ours", "Preempt", "vmss_1", 100)


CLOUDS: dict[str, Callable[[], tuple[Cloud, Callable[[], None]]]] = {
    "aws": interrupted_aws,
    "gcp": preempted_gcp,
    "azure": evicted_azure,
}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_cloud_in_trouble_is_asked_again(cloud: str) -> None:
    """Every kind of trouble, before the first answer and after some."""
    service, announce = CLOUDS[cloud]()
    at_first = [trouble for name, trouble in TROUBLES.items() if (cloud, name) not in FOREIGN]
    truth = [None] if cloud == "gcp" else [None, None]  # Google's second answer is held until there is something to say
    service.trouble = [*at_first, *truth, *TROUBLES.values()]
    questions = len(service.trouble) + 1

    async def told(url: str) -> Notice | None:
        waiting = asyncio.create_task(sources_named([cloud], url)[0].wait())
        await asked_often(service, questions)
        assert not waiting.done()
        announce()
        return await waiting

    with serving(service) as url:
        notice = within(10, told(url))
    assert notice is not None
    assert notice.source == cloud


FOREIGN = {("gcp", name) for name in ("an error", "unavailable", "too many requests", "bytes that are no text")}
"""Without Google's header the first answer is not Google's, whatever it says."""


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_goes_away_is_waited_for(cloud: str) -> None:
    service, announce = CLOUDS[cloud]()

    async def told() -> Notice | None:
        with serving(service) as url:
            waiting = asyncio.create_task(sources_named([cloud], url)[0].wait())
            await asked_often(service, 1 if cloud == "gcp" else 3)  # it is known now to be there
        with pytest.raises(Absent):  # it is really gone
            await ask(url)
        announce()
        with serving(service, urlsplit(url).port or 0):
            return await waiting

    assert within(10, told()) is not None


@pytest.mark.parametrize("cloud", [*CLOUDS, "aws-rebalance"])
def test_where_nobody_listens_a_source_ends_at_once(cloud: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        assert within(2, first_notice(sources_named([cloud], address))) is None


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("other", CLOUDS)
def test_on_another_cloud_a_source_ends_at_once(cloud: str, other: str) -> None:
    if cloud == other:
        return
    service, announce = CLOUDS[other]()
    announce()
    with serving(service) as url:
        assert within(2, first_notice(sources_named([cloud], url))) is None


def test_an_answer_that_does_not_come_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/"
        with pytest.raises(Unusable, match="TimeoutError"):
            within(5, ask(url, answer_s=0.05))
    with pytest.raises(Absent):
        within(5, ask(url))


def test_pauses_between_attempts_double_up_to_a_quarter_of_the_shortest_notice() -> None:
    looked: list[float] = []

    class Broken(MetadataNotices):
        name = "broken"
        every_s = 5.0

        async def look(self) -> Notice | None:
            looked.append(asyncio.get_running_loop().time())
            if len(looked) in (7, 8):
                return None  # it is well again, twice
            if len(looked) == 11:
                return Notice(self.name, 1.0, "at last")
            raise Unusable("out of order")

    assert virtually(Broken(METADATA_URL).wait()) == Notice("broken", 1.0, "at last")
    pauses = [after - before for before, after in itertools.pairwise(looked)]
    assert pauses == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.08, 0.08, 5, 5, 0.01, 0.02])


@pytest.mark.parametrize("date", ["", "yesterday", "Mon, 99 Sep 2016 18:29:47 GMT"])
def test_without_a_date_in_the_response_our_own_clock_has_to_do(date: str) -> None:
    headers = f"Date: {date}\r\n" if date else ""
    cloud = Aws()
    cloud.trouble = [lambda: Answer(0, raw=f"HTTP/1.1 200 OK\r\n{headers}\r\n".encode())]

    async def left_s(url: str) -> float:
        reply = await ask(url)
        return reply.seconds_until(cloud.now()) - reply.seconds_until(cloud.now().replace(year=2000))

    with serving(cloud) as url:
        assert within(5, left_s(url)) == pytest.approx(0.0, abs=1.0)


# Signals

SCRIPT = """
import asyncio
from decentral.workers.notices import first_notice, sources_named

async def main():
    waiting = asyncio.create_task(first_notice(sources_named(["sigterm"])))
    await asyncio.sleep(0.01)
    print("waiting", flush=True)
    print(await waiting, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_the_first_sigterm_is_a_notice_and_the_next_one_kills_as_ever() -> None:
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        try:
            assert process.stdout.readline() == "waiting\n"
            process.terminate()
            notice = Notice("sigterm", GRACE_S, "the process was sent SIGTERM")
            assert process.stdout.readline() == f"{notice}\n"
            process.terminate()
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()


def test_nobody_waits_for_signals_that_cannot_come() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(within, 2, SigtermNotices().wait()).result() is None


def test_whoever_stops_waiting_leaves_the_signal_as_it_was() -> None:
    def ours(_number: int, _frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, ours)
    try:
        with pytest.raises(asyncio.TimeoutError):
            within(0.05, SigtermNotices().wait())
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


# Ray

RAY_SCRIPT = Path(__file__).with_name("draining.py")


@pytest.mark.slow
def test_ray_tells_an_actor_that_its_own_node_is_drained() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(RAY_SCRIPT)], capture_output=True, text=True, timeout=100, env=env, check=False
    )
    assert done.stdout.splitlines() == ["leaf: ray, 90 to 100 s", "head: ray, no time set"], done.stderr


def test_without_ray_its_source_ends_at_once() -> None:
    script = """
import asyncio
from decentral.workers.notices import first_notice, sources_named
print(asyncio.run(first_notice(sources_named(["ray"]))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "None\n"


# Many sources as one


class Told(NoticeSource):
    """Says at `at_s` that `left_s` seconds are left; says nothing if that is None."""

    name = "told"

    def __init__(self, at_s: float, left_s: float | None) -> None:
        self._at_s, self._left_s = at_s, left_s

    async def wait(self) -> Notice | None:
        await asyncio.sleep(self._at_s)
        return None if self._left_s is None else Notice(self.name, self._left_s, f"at {self._at_s:g}")


class Failing(NoticeSource):
    name = "failing"

    async def wait(self) -> Notice | None:
        raise RuntimeError("a bug")


def virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run in virtual time."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def reason(notice: Notice | None) -> str | None:
    return None if notice is None else notice.reason


def test_the_first_notice_wins_and_of_several_at_once_the_most_urgent() -> None:
    assert reason(virtually(first_notice([Told(2, 1), Told(1, 100)]))) == "at 1"
    assert virtually(first_notice([Told(1, 100), Told(1, 30), Told(1, math.inf)])) == Notice("told", 30, "at 1")
    assert reason(virtually(first_notice([Told(1, None), Told(2, math.inf), Told(3, 30)]))) == "at 2"
    assert virtually(first_notice([Told(1, None), Told(2, None)])) is None
    assert virtually(first_notice([])) is None


def test_listening_goes_on_for_what_brings_the_end_nearer() -> None:
    notices: list[Notice] = []
    sources = [Told(1, math.inf), Told(2, 100), Told(10, 95), Told(20, 80), Told(30, 120), Told(40, math.inf)]
    virtually(listen(sources, notices.append))
    assert [notice.reason for notice in notices] == ["at 1", "at 2", "at 20"]  # ends: inf, 102, 100


def test_a_source_that_fails_is_told_of_and_the_others_are_heard() -> None:
    told: list[dict[str, Any]] = []

    async def first() -> Notice | None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context))
        return await first_notice([Failing(), Told(1, 30)])

    assert reason(virtually(first())) == "at 1"
    assert [str(context["exception"]) for context in told] == ["a bug"]


def test_sources_are_made_by_their_names() -> None:
    names = ["sigterm", "ray", "aws", "aws-rebalance", "gcp", "azure"]
    assert list(SOURCES) == names
    assert [source.name for source in sources_named(names)] == names
    with pytest.raises(ConfigError, match="unknown source of notices 'gpc'; did you mean 'gcp'"):
        sources_named(["gpc"])
