"""An asyncio event loop in virtual time.

The clock of the simulated world is the event loop itself. Coroutines written for asyncio run on it unchanged, but
nothing ever waits: when no callback is ready, the clock jumps to the next timer. A simulated hour costs what its
callbacks cost, and the same program makes the same callbacks in the same order every time.

One *instant* is everything that happens at one value of the clock:

1. the timers due at it become ready, in the order in which they were made;
2. ready callbacks run first-in first-out; what they make ready, or due at once, belongs to the same instant;
3. when nothing is ready or due any more, the `at_instant_end` callbacks run. They see all that happened at this
   instant, which is why the network shares its bandwidth there: once, not once for each of a thousand arrivals. They
   may make more work ready; then 2 and 3 repeat;
4. the clock jumps.

No method of this module reads the real clock.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextvars import Context, copy_context
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    _EventLoop = asyncio.BaseEventLoop  # typeshed does not let an AbstractEventLoop leave any method at its default
else:
    _EventLoop = asyncio.AbstractEventLoop  # where every method that we do not write raises NotImplementedError

__all__ = ["Deadlock", "Handle", "VirtualLoop"]

T = TypeVar("T")
ErrorContext = dict[str, Any]
ErrorHandler = Callable[[asyncio.AbstractEventLoop, ErrorContext], object]

STOPS = (KeyboardInterrupt, SystemExit)
"""What ends the program, wherever it comes from: a loop raises it at once, or having closed."""

NAMES_IN_DEADLOCK = 10
CANCELLED_TIMERS_KEPT = 64  # below this a heap is not worth compacting

_logger = logging.getLogger(__name__)


class Deadlock(RuntimeError):
    """The awaited future can never be done: nothing is ready and no timer is left."""


class Handle:
    """A callback that waits for its turn; `cancel` makes sure that it never runs."""

    __slots__ = ("_args", "_callback", "_context", "_owner", "_when")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None, when: float
    ) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._context = copy_context() if context is None else context
        self._when = when
        self._owner: VirtualLoop | None = None  # set exactly while the handle is a timer that waits

    def cancel(self) -> None:
        """Never run the callback; does nothing after it has run or a second time."""
        if self._callback is None:
            return
        self._callback = None
        self._args = ()  # what a cancelled timer refers to must not live until the timer would have been due
        if self._owner is not None:
            self._owner._count_cancelled_timer()

    def cancelled(self) -> bool:
        """Say whether `cancel` has been called."""
        return self._callback is None

    def when(self) -> float:
        """Return the virtual time in seconds at which the callback is due."""
        return self._when


class VirtualLoop(_EventLoop):
    """An event loop whose clock jumps from one event to the next.

    `now` is the virtual time in seconds and `events` counts the callbacks run so far; read them, do not write them.

    An exception that no one handles (in a callback, or in a task that nobody awaits) stops the simulation: it is
    raised by `run_until_complete`, or by `close` if the loop does not run again. What needs real input or output
    raises NotImplementedError.
    """

    def __init__(self) -> None:
        self.events = 0
        self.now = 0.0
        self._ready: deque[Handle] = deque()
        self._timers: dict[float, list[Handle]] = {}  # by the time they are due, in the order in which they were made
        self._times: list[float] = []  # heap of the keys of `_timers`
        self._timers_waiting = 0
        self._timers_cancelled = 0  # of those that wait
        self._instant_end: list[Handle] = []
        self._main: asyncio.Future[Any] | None = None
        self._stopping = False
        self._closing = False
        self._closed = False
        self._error: BaseException | None = None
        self._error_handler: ErrorHandler | None = None
        self._asyncgens: weakref.WeakValueDictionary[int, AsyncGenerator[Any, Any]] = weakref.WeakValueDictionary()
        self._asyncgens_made = 0

    # Time and callbacks.

    def time(self) -> float:
        """Return the virtual time in seconds; it is 0.0 at first."""
        return self.now

    def call_soon(  # type: ignore[override]  # our handle, not asyncio's
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Run the callback at this instant, after what is ready already. Raises RuntimeError on a closed loop."""
        if self._closed:
            raise RuntimeError("the virtual loop is closed")
        handle = Handle(callback, args, context, self.now)
        self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Do what `call_soon` does: a simulation has one thread, executors included."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Run the callback `delay` seconds from now; see `call_at`."""
        return self.call_at(self.now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Handle:
        """Run the callback at virtual time `when`: a past time means this instant, infinity means never.

        Raises ValueError if `when` is not a number and RuntimeError on a closed loop.
        """
        if self._closed:
            raise RuntimeError("the virtual loop is closed")
        if not when > self.now:
            if math.isnan(when):
                raise ValueError("a timer must be due at a number of seconds or at infinity, not at nan")
            when = self.now  # not the past: timers due together run in the order in which they were made
        handle = Handle(callback, args, context, when)
        if when != math.inf:
            handle._owner = self
            self._timers_waiting += 1
            due_then = self._timers.get(when)
            if due_then is not None:  # a fleet in lockstep has a thousand timers due at one time
                due_then.append(handle)
            else:
                self._timers[when] = [handle]
                heappush(self._times, when)
        return handle

    def sleep(self, delay: float) -> asyncio.Future[None]:
        """Return a future that is done `delay` seconds from now: what `asyncio.sleep` is, in half the time."""
        future: asyncio.Future[None] = asyncio.Future(loop=self)
        self.call_at(self.now + delay, _finish, future)
        return future

    def at_instant_end(self, callback: Callable[[], object]) -> None:
        """Run the callback once, after all that happens at this instant and before the clock moves."""
        if self._closed:
            raise RuntimeError("the virtual loop is closed")
        self._instant_end.append(Handle(callback, (), None, self.now))

    def _count_cancelled_timer(self) -> None:
        self._timers_cancelled += 1
        if self._timers_cancelled > CANCELLED_TIMERS_KEPT and 2 * self._timers_cancelled > self._timers_waiting:
            live = [[timer for timer in timers if timer._callback is not None] for timers in self._timers.values()]
            self._timers = {timers[0]._when: timers for timers in live if timers}
            self._times = list(self._timers)
            heapify(self._times)
            self._timers_waiting -= self._timers_cancelled
            self._timers_cancelled = 0

    # Futures and tasks.

    def create_future(self) -> asyncio.Future[Any]:
        """Return a new future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Generator[Any, None, T] | Coroutine[Any, Any, T], **kwargs: Any) -> asyncio.Task[T]:
        """Run a coroutine as a task; `kwargs` are those of asyncio.Task (name; context from Python 3.11 on)."""
        return asyncio.Task(coro, loop=self, **kwargs)

    def run_in_executor(  # type: ignore[override]  # typeshed: a future of T only, which an error is not
        self, executor: object, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Call the function here and now, whatever the executor; no virtual time passes."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # whatever it is, it belongs to who awaits the future
            future.set_exception(error)
        return future

    get_debug = staticmethod(bool)
    """Returns False: asyncio's debug mode measures real time. `bool` because every new future calls it."""

    # Running.

    def is_running(self) -> bool:
        """Say whether this loop is the one that runs in this thread."""
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        """Say whether `close` has been called."""
        return self._closed

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Run until the future or coroutine is done and return its result.

        Raises what the future raises, the first error that nobody handled, Deadlock when nothing is left that
        could make progress, and RuntimeError on a closed loop or inside of a running one.
        """
        self._check_idle()
        main: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type]
        try:
            if self._error is None:
                self._drive(main)
            self._raise_unhandled()
        except BaseException:
            _mark_retrieved(main)  # one error is raised; asyncio need not report a second one when `main` is freed
            raise
        return main.result()

    def close(self) -> None:
        """Cancel all tasks, let them clean up, and drop what is scheduled. Closing twice does nothing.

        Raises an error that nobody handled and RuntimeError while the loop runs.
        """
        if self._closed:
            return
        self._check_idle()
        self._closing = True
        try:
            self._cancel_tasks()
            self._drive(asyncio.ensure_future(self.shutdown_asyncgens(), loop=self))
        finally:
            self._ready.clear()
            self._timers.clear()
            self._times.clear()
            self._instant_end.clear()
            self._closed = True
        self._raise_unhandled()

    async def shutdown_asyncgens(self) -> None:
        """Close the asynchronous generators that were begun on this loop and not finished."""
        generators = list(self._asyncgens.values())
        self._asyncgens.clear()
        closing = [generator.aclose() for generator in generators]
        for result in await asyncio.gather(*closing, return_exceptions=True):
            if isinstance(result, Exception):
                self.call_exception_handler({"message": "closing an asynchronous generator", "exception": result})

    def _check_idle(self) -> None:
        if self._closed:
            raise RuntimeError("the virtual loop is closed")
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("an event loop runs in this thread already: run or close this one outside of it")

    def _drive(self, main: asyncio.Future[Any]) -> None:
        """Run callbacks until `main` is done or, unless the loop is being closed, an error is not handled."""
        self._main = main
        self._stopping = False
        main.add_done_callback(self._on_done)
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(firstiter=self._on_asyncgen, finalizer=self._finish_asyncgen)
        asyncio._set_running_loop(self)
        try:
            self._run()
        finally:
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)
            main.remove_done_callback(self._on_done)
            self._main = None

    def _on_done(self, future: asyncio.Future[Any]) -> None:
        if future is self._main:  # not one of a former run, which an error stopped before this callback had its turn
            self._stopping = True

    def _run(self) -> None:
        ready = self._ready
        while not self._stopping:
            if not ready:
                if not self._advance():
                    raise Deadlock(self._describe_deadlock())
                continue
            handle = ready.popleft()
            callback = handle._callback
            if callback is None:
                continue
            self.events += 1
            try:
                handle._context.run(callback, *handle._args)
            except STOPS as error:
                if isinstance(task := getattr(callback, "__self__", None), asyncio.Task):
                    _mark_retrieved(task)  # it holds the same error, which is raised here
                if not self._closing:
                    raise
                self._error = error  # raised when every task has cleaned up
            except BaseException as error:  # CancelledError too: from a callback it is an error
                self.call_exception_handler({"message": f"error in callback {callback!r}", "exception": error})

    def _advance(self) -> bool:
        """Make the next callbacks ready, moving the clock only if this instant is over; False if there are none."""
        due = self._next_due()
        if self._instant_end and due > self.now:
            self._ready.extend(self._instant_end)
            self._instant_end.clear()
            return True
        if due == math.inf:
            return False
        self.now = due
        self._ready.extend(self._take_timers(due))
        return True

    def _next_due(self) -> float:
        """Return when the first timer is due that is not cancelled, infinity if there is none."""
        while self._times:
            due = self._times[0]
            for timer in self._timers[due]:
                if timer._callback is not None:
                    return due
            self._take_timers(due)
        return math.inf

    def _take_timers(self, due: float) -> list[Handle]:
        """Remove the timers of the first time and return them, those that are cancelled too."""
        heappop(self._times)
        timers = self._timers.pop(due)
        self._timers_waiting -= len(timers)
        for timer in timers:
            timer._owner = None
            if timer._callback is None:
                self._timers_cancelled -= 1
        return timers

    def _pending_tasks(self) -> list[asyncio.Task[Any]]:
        # asyncio keeps a set, whose order changes from run to run. Shorter names first: worker-9 before worker-10.
        return sorted(asyncio.all_tasks(self), key=lambda task: (len(task.get_name()), task.get_name()))

    def _describe_deadlock(self) -> str:
        names = [task.get_name() for task in self._pending_tasks()]
        shown = ", ".join(names[:NAMES_IN_DEADLOCK]) or "none"
        more = f" and {len(names) - NAMES_IN_DEADLOCK} more" if len(names) > NAMES_IN_DEADLOCK else ""
        return f"nothing can happen any more at virtual time {self.now:g} s; tasks that wait: {shown}{more}"

    def _cancel_tasks(self) -> None:
        while tasks := self._pending_tasks():  # again, because cleaning up may start tasks
            for task in tasks:
                task.cancel()
            self._drive(asyncio.gather(*tasks, return_exceptions=True))
            for task in tasks:
                if not task.cancelled() and not isinstance(task.exception(), (type(None), *STOPS)):
                    self.call_exception_handler({"message": f"closing {task!r}", "exception": task.exception()})

    def _on_asyncgen(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._asyncgens_made += 1
        self._asyncgens[self._asyncgens_made] = generator

    def _finish_asyncgen(self, generator: AsyncGenerator[Any, Any]) -> None:
        if not self._closed:
            self.create_task(generator.aclose())

    # Errors.

    def set_exception_handler(self, handler: ErrorHandler | None) -> None:
        """Let `handler(loop, context)` decide about errors that nobody handled; None restores the default."""
        self._error_handler = handler

    def get_exception_handler(self) -> ErrorHandler | None:
        """Return what `set_exception_handler` has set."""
        return self._error_handler

    def call_exception_handler(self, context: ErrorContext) -> None:
        """Report an error that nobody handled; keys of the context as in asyncio: message, exception, ..."""
        if self._error_handler is None:
            self.default_exception_handler(context)
        else:
            self._error_handler(self, context)

    def default_exception_handler(self, context: ErrorContext) -> None:
        """Stop the simulation with this error; log it if another one came first or the loop is closed."""
        error = context.get("exception")
        if error is None:
            error = RuntimeError(context["message"])
        if self._error is None and not self._closed:
            self._error = error
            self._stopping = self._stopping or not self._closing  # closing goes on: every task may clean up
        else:
            _logger.error(context["message"], exc_info=error)

    def _raise_unhandled(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _mark_retrieved(future: asyncio.Future[Any]) -> None:
    if future.done() and not future.cancelled():
        future.exception()
