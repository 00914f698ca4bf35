"""Asking a cloud's metadata service: a small HTTP client that can be cancelled, and the loop that keeps asking."""

from __future__ import annotations

import asyncio
import http.client
import io
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from decentral.workers.notices.notice import Notice, NoticeSource

METADATA_URL = "http://169.254.169.254"
"""Where AWS, Google Cloud and Azure all answer a machine's questions about itself."""

REACH_S = 1.0
"""Seconds to connect. The service is on the machine's own host: what is not there after so long is not there."""
ANSWER_S = 5.0
"""Seconds an answer may take, unless the service is asked to take its time."""
LARGEST_ANSWER = 1 << 18
"""Bytes; what is longer is cut, and then no answer that we know."""
RETRY_S = 1.0
RETRY_MOST_S = 8.0
"""Seconds until an answer that could not be used is asked for again: twice as many each time, up to these. The shortest
notices are 30 s: an endpoint that has been failing for long must not cost much of one."""


class Absent(Exception):
    """There is no such service here: nobody answers, or somebody else does."""


class Unusable(Exception):
    """What came is no answer; another attempt may get one."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete HTTP response."""

    status: int
    headers: Message
    body: str

    def seconds_until(self, moment: datetime) -> float:
        """Return the seconds from now to a moment that the service names, by its own clock; at least 0.

        The machine's clock may be wrong: what counts is the response's Date. It is cut to whole seconds, so that one
        second more may have passed. Without a usable Date, the machine's clock has to do.
        """
        try:
            passed_s, now = 1.0, parsedate_to_datetime(self.headers["Date"])
            left_s = (moment - now).total_seconds()
        except (TypeError, ValueError):  # none, garbage, or one without a time zone
            passed_s, left_s = 0.0, (moment - datetime.now(timezone.utc)).total_seconds()
        return max(0.0, left_s - passed_s)


async def ask(
    url: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: str = "",
    answer_s: float = ANSWER_S,
) -> Reply:
    """Return the response to one HTTP request. Raises `Absent` if nobody listens, `Unusable` if no response comes."""
    where = urlsplit(url)
    try:
        reader, writer = await asyncio.wait_for(
            asyncio.open_connection(where.hostname, where.port or 80, limit=LARGEST_ANSWER), REACH_S
        )
    except (OSError, asyncio.TimeoutError) as error:
        raise Absent(f"{where.netloc}: {error}") from error
    fields = {"Host": where.netloc, "Connection": "close", **(headers or {})}
    if method != "GET":
        fields["Content-Length"] = str(len(body.encode()))
    head = f"{method} {where.path}{'?' if where.query else ''}{where.query} HTTP/1.1\r\n"
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    try:
        writer.write(f"{head}{lines}\r\n{body}".encode())
        return _parsed(method, await asyncio.wait_for(_all_of(reader), answer_s))
    except (OSError, asyncio.TimeoutError, http.client.HTTPException, ValueError) as error:
        raise Unusable(f"{url}: {type(error).__name__} {error}") from error
    finally:
        writer.close()


async def _all_of(reader: asyncio.StreamReader) -> bytes:
    """Return what comes until the other side hangs up, as it was asked to."""
    data = b""
    while len(data) < LARGEST_ANSWER and (more := await reader.read(LARGEST_ANSWER)):
        data += more
    return data


class _Received:
    """Bytes that `http.client` takes for a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _parsed(method: str, data: bytes) -> Reply:
    source: Any = _Received(data)
    response = http.client.HTTPResponse(source, method=method)
    response.begin()
    return Reply(response.status, response.headers, response.read().decode())


class MetadataNotices(NoticeSource):
    """A source that asks a metadata service at `url` again and again.

    Where there is none, or another cloud's, it ends at once. Once it has answered, it is asked for ever: it may be
    down, slow or out of its mind for a while.
    """

    every_s: float
    """Seconds between two questions."""

    def __init__(self, url: str = METADATA_URL) -> None:
        self._url = url

    @abstractmethod
    async def look(self) -> Notice | None:
        """Ask once; return the notice if there is one.

        Raises `Absent` if this is not the right service, `Unusable` or `ValueError` for what cannot be understood.
        """

    async def wait(self) -> Notice | None:
        known, retry_s = False, RETRY_S
        while True:
            pause_s = retry_s
            try:
                notice = await self.look()
            except Absent:
                if not known:
                    return None
                retry_s = min(2 * retry_s, RETRY_MOST_S)
            except (Unusable, ValueError):
                retry_s = min(2 * retry_s, RETRY_MOST_S)
            else:
                if notice is not None:
                    return notice
                known, retry_s, pause_s = True, RETRY_S, self.every_s
            await asyncio.sleep(pause_s)


def usable(reply: Reply) -> Reply:
    """Return a reply of status 200 as it is; raises `Unusable` for any other."""
    if reply.status != 200:
        raise Unusable(f"status {reply.status}")
    return reply


def at_home(reply: Reply) -> Reply:
    """Return the reply to a first question; raises `Absent` if it is that of a service that does not know us.

    Another cloud's finds fault with the question, and a service that is switched off may not tell.
    """
    if reply.status in (400, 401, 403, 404, 405):
        raise Absent(f"status {reply.status}")
    return usable(reply)
