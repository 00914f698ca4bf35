"""The virtual event loop: asyncio runs on it unchanged, in an order that never varies, and no error gets lost."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import math
import random
import sys
import warnings
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

import pytest

from decentral.sim.clock import Deadlock, Handle, VirtualLoop

T = TypeVar("T")


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    virtual = VirtualLoop()
    yield virtual
    virtual.close()


def run(main: Coroutine[Any, Any, T]) -> T:
    virtual = VirtualLoop()
    try:
        return virtual.run_until_complete(main)
    finally:
        virtual.close()


# Time.


def test_clock_starts_at_zero_and_jumps_to_the_end_of_a_sleep(loop: VirtualLoop) -> None:
    assert loop.time() == 0.0
    loop.run_until_complete(asyncio.sleep(3600.5))
    assert loop.time() == 3600.5


def test_time_goes_on_in_a_second_run(loop: VirtualLoop) -> None:
    loop.run_until_complete(asyncio.sleep(1.0))
    loop.run_until_complete(asyncio.sleep(2.0))
    assert loop.time() == 3.0


def test_sleep_returns_its_result_and_gather_keeps_the_order_of_its_arguments(loop: VirtualLoop) -> None:
    async def main() -> list[str]:
        return list(await asyncio.gather(asyncio.sleep(2, "slow"), asyncio.sleep(1, "fast"), asyncio.sleep(0, "now")))

    assert loop.run_until_complete(main()) == ["slow", "fast", "now"]
    assert loop.time() == 2.0


# Order.


def test_timers_due_together_run_in_the_order_they_were_made(loop: VirtualLoop) -> None:
    ran: list[int] = []
    for number in range(50):
        loop.call_at(5.0, ran.append, number)
        loop.call_at(9.0 - number / 10, len, ())  # others between them, so that the heap is stirred
    loop.run_until_complete(asyncio.sleep(10))
    assert ran == list(range(50))


def test_timers_run_in_the_order_of_their_times(loop: VirtualLoop) -> None:
    times = [random.Random(1).uniform(0, 10) for _ in range(200)]
    seen: list[float] = []
    for when in times:
        loop.call_at(when, lambda: seen.append(loop.time()))
    loop.run_until_complete(asyncio.sleep(10))
    assert seen == sorted(times)


def test_timer_in_the_past_is_due_now_and_keeps_its_turn(loop: VirtualLoop) -> None:
    ran: list[tuple[str, float]] = []

    def note(name: str) -> None:
        ran.append((name, loop.time()))

    async def main() -> None:
        await asyncio.sleep(5)
        loop.call_at(5.0, note, "now")
        past = loop.call_at(1.0, note, "past")
        loop.call_later(-2.0, note, "negative delay")
        assert past.when() == 5.0
        await asyncio.sleep(1)

    loop.run_until_complete(main())
    assert ran == [("now", 5.0), ("past", 5.0), ("negative delay", 5.0)]


def test_ready_callbacks_run_before_the_clock_moves(loop: VirtualLoop) -> None:
    seen: list[float] = []

    def again(left: int) -> None:
        seen.append(loop.time())
        if left:
            loop.call_soon(again, left - 1)

    loop.call_later(1.0, seen.append, -1.0)
    loop.call_soon(again, 20)
    loop.run_until_complete(asyncio.sleep(1.0))
    assert seen == [0.0] * 21 + [-1.0]


def test_timer_at_infinity_never_fires_and_one_at_nan_is_refused(loop: VirtualLoop) -> None:
    forever = loop.call_at(math.inf, pytest.fail, "fired")
    with pytest.raises(ValueError, match="nan"):
        loop.call_later(math.nan, pytest.fail, "fired")
    loop.run_until_complete(asyncio.sleep(1e12))
    assert not forever.cancelled()
    with pytest.raises(Deadlock):
        loop.run_until_complete(asyncio.sleep(math.inf))


def test_same_program_makes_the_same_events() -> None:
    def trace() -> tuple[list[tuple[float, int, int]], int]:
        virtual = VirtualLoop()
        seen: list[tuple[float, int, int]] = []
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=3)

        async def worker(me: int) -> None:
            rng = random.Random(me)
            for step in range(20):
                await asyncio.sleep(rng.choice([0.0, 0.5, 1.0, rng.random()]))
                await queue.put(me)
                seen.append((virtual.time(), me, await queue.get() * 100 + step))

        async def main() -> None:
            await asyncio.gather(*(worker(me) for me in range(10)))

        virtual.run_until_complete(main())
        virtual.close()
        return seen, virtual.events

    assert trace() == trace()


# Cancelled timers.


def test_cancelled_handles_do_not_run_nor_move_the_clock(loop: VirtualLoop) -> None:
    timer = loop.call_later(5.0, pytest.fail, "timer ran")
    soon = loop.call_soon(pytest.fail, "callback ran")
    timer.cancel()
    timer.cancel()
    soon.cancel()
    assert timer.cancelled()
    assert soon.cancelled()
    assert timer.when() == 5.0
    loop.run_until_complete(asyncio.sleep(1))
    with pytest.raises(Deadlock):
        loop.run_until_complete(loop.create_future())
    assert loop.time() == 1.0


def test_timer_cancelled_by_another_of_the_same_instant_does_not_run(loop: VirtualLoop) -> None:
    victims: list[Handle] = []
    loop.call_at(1.0, lambda: victims[0].cancel())
    victims.append(loop.call_at(1.0, pytest.fail, "victim ran"))
    loop.call_at(1.0, pytest.fail, "a timer cancelled beforehand ran").cancel()
    loop.run_until_complete(asyncio.sleep(2))
    assert loop._timers_cancelled == 0


def test_heap_of_timers_is_compacted_when_cancelled_ones_dominate(loop: VirtualLoop) -> None:
    ran: list[int] = []
    kept = [loop.call_at(1000.0 + number, ran.append, number) for number in range(10)]
    for number in range(100_000):
        loop.call_at(5000.0 - number / 100, pytest.fail, "ran").cancel()
        assert len(loop._timers) <= 200
    loop.run_until_complete(asyncio.sleep(10_000))
    assert ran == list(range(10))
    assert not any(timer.cancelled() for timer in kept)


def test_cancelling_timers_that_already_ran_does_not_upset_the_heap(loop: VirtualLoop) -> None:
    spent = [loop.call_at(1.0, lambda: None) for _ in range(500)]
    ran: list[float] = []
    loop.call_at(3.0, lambda: ran.append(loop.time()))
    loop.run_until_complete(asyncio.sleep(2))
    for timer in spent:
        timer.cancel()
    loop.run_until_complete(asyncio.sleep(2))
    assert ran == [3.0]
    assert loop._timers_cancelled == 0


# Instant end.


def test_instant_end_comes_after_everything_of_the_instant_and_before_the_clock_moves(loop: VirtualLoop) -> None:
    ran: list[tuple[str, float]] = []

    def note(name: str) -> None:
        ran.append((name, loop.time()))

    def first() -> None:
        loop.at_instant_end(lambda: note("end"))
        loop.call_soon(note, "soon")
        loop.call_later(0.0, note, "timer of zero")
        loop.call_soon(loop.call_soon, note, "soon of soon")

    loop.call_at(1.0, first)
    loop.call_at(1.0, note, "second timer")
    loop.call_at(1.5, note, "next instant")
    loop.run_until_complete(asyncio.sleep(2))
    assert ran == [
        ("second timer", 1.0),
        ("soon", 1.0),
        ("soon of soon", 1.0),
        ("timer of zero", 1.0),
        ("end", 1.0),
        ("next instant", 1.5),
    ]


def test_instant_end_comes_again_when_it_makes_more_work(loop: VirtualLoop) -> None:
    ran: list[tuple[str, float]] = []

    def note(name: str) -> None:
        ran.append((name, loop.time()))

    def outer() -> None:
        note("outer")
        loop.at_instant_end(lambda: note("inner"))
        loop.call_soon(note, "made by outer")

    loop.at_instant_end(outer)
    loop.at_instant_end(lambda: note("beside outer"))
    loop.run_until_complete(asyncio.sleep(1))
    assert ran == [("outer", 0.0), ("beside outer", 0.0), ("made by outer", 0.0), ("inner", 0.0)]


def test_instant_end_runs_when_no_timer_is_left(loop: VirtualLoop) -> None:
    done = loop.create_future()
    loop.at_instant_end(lambda: done.set_result(7))
    assert loop.run_until_complete(done) == 7


# Waiting with a limit.


def test_wait_for_gives_up_at_its_deadline_and_cancels(loop: VirtualLoop) -> None:
    cleaned: list[float] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            cleaned.append(loop.time())

    async def main() -> str:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slow(), timeout=2.5)
        return await asyncio.wait_for(asyncio.sleep(1, "in time"), timeout=2.5)

    assert loop.run_until_complete(main()) == "in time"
    assert cleaned == [2.5]
    assert loop.time() == 3.5


def test_wait_returns_the_first_that_is_done(loop: VirtualLoop) -> None:
    async def main() -> None:
        tasks = [asyncio.create_task(asyncio.sleep(delay, delay)) for delay in (3, 1, 2)]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result() for task in done] == [1]
        assert len(pending) == 2
        done, pending = await asyncio.wait(tasks, timeout=1.5)
        assert sorted(task.result() for task in done) == [1, 2]
        assert len(pending) == 1

    loop.run_until_complete(main())
    assert loop.time() == 2.5


if sys.version_info >= (3, 11):  # asyncio.timeout and TaskGroup came with it
    from builtins import BaseExceptionGroup

    def test_timeout_and_task_group(loop: VirtualLoop) -> None:
        finished: list[str] = []

        async def note(delay: float, name: str) -> None:
            await asyncio.sleep(delay)
            finished.append(name)

        async def fail() -> None:
            await asyncio.sleep(1)
            raise KeyError("broken")

        async def fail_in_group() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(note(5, "sibling of a failure"))
                group.create_task(fail())

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(note(2, "two"))
                group.create_task(note(1, "one"))
            assert loop.time() == 2.0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await note(1, "too late")
            assert loop.time() == 2.5
            with pytest.raises(BaseExceptionGroup) as caught:
                await fail_in_group()
            assert [str(error) for error in caught.value.exceptions] == ["'broken'"]

        loop.run_until_complete(main())
        assert finished == ["one", "two"]
        assert loop.time() == 3.5


# Tasks talking to each other.


def test_queue_event_and_lock(loop: VirtualLoop) -> None:
    log: list[tuple[float, str]] = []

    async def produce(queue: asyncio.Queue[int]) -> None:
        for item in range(3):
            await asyncio.sleep(1)
            await queue.put(item)

    async def hold(lock: asyncio.Lock, go: asyncio.Event, name: str) -> None:
        await go.wait()
        async with lock:
            await asyncio.sleep(0.5)
            log.append((loop.time(), name))

    async def main() -> None:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        lock, go = asyncio.Lock(), asyncio.Event()
        tasks = [asyncio.create_task(hold(lock, go, name)) for name in ("a", "b", "c")]
        producer = asyncio.create_task(produce(queue))
        assert [await queue.get() for _ in range(3)] == [0, 1, 2]
        go.set()
        await asyncio.gather(producer, *tasks)

    loop.run_until_complete(main())
    assert log == [(3.5, "a"), (4.0, "b"), (4.5, "c")]


def test_cancelling_a_task_runs_its_cleanup_at_once(loop: VirtualLoop) -> None:
    cleaned: list[float] = []

    async def worker() -> None:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(0.5)
            cleaned.append(loop.time())
            raise

    async def main() -> None:
        task = asyncio.create_task(worker())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    loop.run_until_complete(main())
    assert cleaned == [1.5]


def test_gather_passes_the_first_exception_and_can_return_them(loop: VirtualLoop) -> None:
    async def fail(delay: float) -> None:
        await asyncio.sleep(delay)
        raise ValueError(f"after {delay}")

    async def main() -> None:
        with pytest.raises(ValueError, match="after 1"):
            await asyncio.gather(fail(2), fail(1))
        results = await asyncio.gather(fail(1), asyncio.sleep(1, "fine"), return_exceptions=True)
        assert isinstance(results[0], ValueError)
        assert results[1] == "fine"

    loop.run_until_complete(main())


def test_tasks_and_callbacks_see_the_context_they_were_made_in(loop: VirtualLoop) -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="unset")
    seen: list[str] = []

    async def main() -> None:
        name.set("main")
        loop.call_later(1, lambda: seen.append(name.get()))
        loop.call_soon(lambda: seen.append(name.get()), context=contextvars.Context())  # empty, and still not replaced
        name.set("changed")
        await asyncio.sleep(2)

    loop.run_until_complete(main())
    assert seen == ["unset", "main"]


def test_asynchronous_generators_are_closed(loop: VirtualLoop) -> None:
    closed: list[tuple[str, float]] = []

    async def count(name: str) -> AsyncIterator[int]:
        try:
            for number in range(100):
                yield number
        finally:
            await asyncio.sleep(1)
            closed.append((name, loop.time()))

    async def main() -> AsyncIterator[int]:
        async for _ in count("dropped"):
            break
        gc.collect()
        await asyncio.sleep(2)
        kept = count("kept")
        await kept.__anext__()
        return kept

    kept = loop.run_until_complete(main())
    assert closed == [("dropped", 1.0)]
    loop.close()
    assert closed == [("dropped", 1.0), ("kept", 3.0)]
    assert kept is not None


# Executors.


def test_executor_runs_inline_and_takes_no_time(loop: VirtualLoop) -> None:
    def divide(one: float, other: float) -> tuple[float, float]:
        return one / other, loop.time()

    async def main() -> None:
        await asyncio.sleep(4)
        assert await loop.run_in_executor(None, divide, 6, 3) == (2.0, 4.0)
        assert await asyncio.to_thread(divide, 1, 2) == (0.5, 4.0)
        with pytest.raises(ZeroDivisionError):
            await loop.run_in_executor(None, divide, 1, 0)

    loop.run_until_complete(main())


def test_real_input_and_output_is_refused(loop: VirtualLoop) -> None:
    async def main() -> None:
        with pytest.raises(NotImplementedError):
            await asyncio.open_connection("localhost", 1)

    loop.run_until_complete(main())


# Errors.


def test_deadlock_names_the_tasks_that_wait_and_the_time(loop: VirtualLoop) -> None:
    async def wait(event: asyncio.Event) -> None:
        await event.wait()

    async def main() -> None:
        await asyncio.sleep(1.5)
        event = asyncio.Event()
        await asyncio.gather(*(asyncio.create_task(wait(event), name=f"worker-{number}") for number in range(12)))

    with pytest.raises(Deadlock) as caught:
        loop.run_until_complete(main())
    message = str(caught.value)
    assert "virtual time 1.5 s" in message
    assert "worker-0, worker-1, worker-2" in message  # by number, not by the order of a set
    assert message.count(",") == 9
    assert message.endswith("and 3 more")


def test_error_in_a_callback_stops_the_run_and_is_raised(loop: VirtualLoop) -> None:
    async def main() -> None:
        loop.call_later(1.0, dict[str, int]().__getitem__, "missing")
        loop.call_later(2.0, pytest.fail, "the simulation went on after an error")
        await asyncio.sleep(10)

    with pytest.raises(KeyError, match="missing"):
        loop.run_until_complete(main())
    assert loop.time() == 1.0
    assert not loop.is_running()


def test_error_of_a_task_that_nobody_awaits_is_raised(loop: VirtualLoop) -> None:
    async def fail() -> None:
        raise ValueError("nobody is listening")

    async def main() -> None:
        loop.create_task(fail())
        await asyncio.sleep(10)

    with pytest.raises(ValueError, match="nobody is listening"):
        loop.run_until_complete(main())


def test_first_of_two_errors_is_raised_and_the_loop_can_go_on(loop: VirtualLoop) -> None:
    loop.call_at(1.0, lambda: 1 / 0)
    loop.call_at(2.0, lambda: [].pop())
    with pytest.raises(ZeroDivisionError):
        loop.run_until_complete(asyncio.sleep(5))
    with pytest.raises(IndexError):
        loop.run_until_complete(asyncio.sleep(5))
    loop.run_until_complete(asyncio.sleep(5))
    assert loop.time() == 7.0  # 2 s after the second error, and the first two sleeps did not end the third early


def test_exception_handler_of_the_user_decides(loop: VirtualLoop) -> None:
    seen: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: seen.append(context["exception"]))
    loop.call_soon(lambda: 1 / 0)
    loop.run_until_complete(asyncio.sleep(1))
    assert [type(error) for error in seen] == [ZeroDivisionError]


def test_error_of_the_main_coroutine_is_raised_once_and_the_loop_is_left(loop: VirtualLoop) -> None:
    async def main() -> None:
        assert asyncio.get_running_loop() is loop
        raise ValueError("main")

    hooks = sys.get_asyncgen_hooks()
    with pytest.raises(ValueError, match="main"):
        loop.run_until_complete(main())
    assert sys.get_asyncgen_hooks() == hooks
    with pytest.raises(RuntimeError, match="no running event loop"):
        asyncio.get_running_loop()
    assert loop.run_until_complete(asyncio.sleep(1, "still works")) == "still works"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_through_tasks_and_callbacks(loop: VirtualLoop, error: type[BaseException]) -> None:
    def interrupt() -> None:
        raise error

    async def main() -> None:
        interrupt()

    loop.call_later(1, interrupt)
    with pytest.raises(error):
        loop.run_until_complete(asyncio.sleep(2))
    with pytest.raises(error):
        loop.run_until_complete(main())
    assert asyncio._get_running_loop() is None


def test_loop_does_not_run_inside_of_a_loop(loop: VirtualLoop) -> None:
    async def nested() -> None:
        inner = VirtualLoop()
        with pytest.raises(RuntimeError, match="in this thread already"):
            inner.run_until_complete(inner.create_future())

    loop.run_until_complete(nested())
    asyncio.run(nested())


# Closing.


def test_closing_cancels_tasks_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    virtual = VirtualLoop()
    ended: list[str] = []

    async def worker(name: str) -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            await asyncio.sleep(1)
            ended.append(name)

    async def main() -> None:
        for name in ("b", "a"):
            virtual.create_task(worker(name))
        virtual.create_task(asyncio.sleep(0))
        await asyncio.sleep(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        virtual.run_until_complete(main())
        never_started = virtual.create_task(worker("never started"))
        virtual.close()
        gc.collect()
    assert ended == ["b", "a"]
    assert never_started.cancelled()
    assert caplog.records == []


def test_closing_after_a_deadlock_or_an_error_is_clean(caplog: pytest.LogCaptureFixture) -> None:
    async def stuck() -> None:
        await asyncio.gather(asyncio.Event().wait(), asyncio.Queue[int]().get())

    async def fail() -> None:
        asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        await stuck()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for main, error in ((stuck, Deadlock), (fail, ZeroDivisionError)):
            with pytest.raises(error):
                run(main())
        gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("in_callback", [False, True])
def test_closing_raises_what_cleaning_up_raises_after_all_have_cleaned_up(in_callback: bool) -> None:
    virtual = VirtualLoop()
    ended: list[str] = []

    def fail() -> None:
        raise ValueError("could not clean up")

    async def bad() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            ended.append("bad")
            if in_callback:
                virtual.call_soon(fail)
            else:
                fail()

    async def good() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            await asyncio.sleep(1)
            ended.append("good")

    tasks = [virtual.create_task(bad()), virtual.create_task(good())]
    virtual.run_until_complete(asyncio.sleep(1))
    with pytest.raises(ValueError, match="could not clean up"):
        virtual.close()
    assert ended == ["bad", "good"]
    assert all(task.done() for task in tasks)


def test_closing_also_cancels_tasks_that_cleaning_up_starts() -> None:
    virtual = VirtualLoop()
    started: list[asyncio.Task[None]] = []

    async def worker() -> None:
        try:
            await asyncio.sleep(1e9)
        finally:
            started.append(virtual.create_task(asyncio.sleep(1e9)))

    virtual.create_task(worker())
    virtual.run_until_complete(asyncio.sleep(1))
    virtual.close()
    assert [task.cancelled() for task in started] == [True]
    assert virtual.time() == 1.0


def test_closed_loop_refuses_work_and_closes_twice() -> None:
    virtual = VirtualLoop()
    virtual.close()
    virtual.close()
    assert virtual.is_closed()
    for schedule in (virtual.call_soon, virtual.at_instant_end):
        with pytest.raises(RuntimeError, match="closed"):
            schedule(print)
    with pytest.raises(RuntimeError, match="closed"):
        virtual.call_later(1, print)
    with pytest.raises(RuntimeError, match="closed"):
        virtual.run_until_complete(asyncio.Future(loop=virtual))


def test_events_counts_callbacks(loop: VirtualLoop) -> None:
    for _ in range(5):
        loop.call_soon(len, ())
    loop.call_soon(len, ()).cancel()
    loop.run_until_complete(asyncio.sleep(0))
    before = loop.events
    loop.run_until_complete(asyncio.sleep(1))
    # The task starts, its timer fires, the task wakes up, and the loop hears that it is done.
    assert before == 5 + 3
    assert loop.events - before == 4
