"""Metadata services as their vendors document them, over real HTTP on this machine."""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True)
class Answer:
    """A response; `raw` is sent instead of all the rest, and nothing at all if it is empty."""

    status: int
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None


Trouble = Callable[[], Answer]
TROUBLES: dict[str, Trouble] = {
    "an error": lambda: Answer(500, "try later"),
    "unavailable": lambda: Answer(503),
    "too many requests": lambda: Answer(429),
    "nonsense": lambda: Answer(200, '{"action": 7}', {"Metadata-Flavor": "Google"}),
    "bytes that are no text": lambda: Answer(200, raw=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xfe"),
    "no HTTP": lambda: Answer(0, raw=b"\x00\x01\x02 what?\r\n\r\n"),
    "half an answer": lambda: Answer(0, raw=b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nTRUE"),
    "nothing": lambda: Answer(0, raw=b""),
}


class Cloud(ABC):
    """One machine's metadata service. Its clock is `ahead_s` seconds ahead of this machine's."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        self._ahead = timedelta(seconds=ahead_s)
        self.asked: list[Asked] = []
        self.trouble: list[Trouble | None] = []
        """What the next requests get instead of an answer; None: the answer."""

    def now(self) -> datetime:
        return datetime.now(timezone.utc) + self._ahead

    def answer(self, asked: Asked) -> Answer:
        self.asked.append(asked)
        trouble = self.trouble.pop(0) if self.trouble else None
        return self.answered(asked) if trouble is None else trouble()

    @abstractmethod
    def answered(self, asked: Asked) -> Answer: ...


class Aws(Cloud):
    """IMDSv2. What is in `items` is there; tokens are good for as many questions as `token_lasts` says."""

    def __init__(self, ahead_s: float = 0.0, token_lasts: int = 1000) -> None:
        super().__init__(ahead_s)
        self.items: dict[str, str] = {}
        self._token_lasts = token_lasts
        self._left: dict[str, int] = {}

    def interrupt(self, action: str, in_s: float) -> None:
        at = self.now() + timedelta(seconds=in_s)
        self.items["spot/instance-action"] = json.dumps({"action": action, "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"})

    def recommend(self) -> None:
        self.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": f"{self.now():%Y-%m-%dT%H:%M:%SZ}"})

    def answered(self, asked: Asked) -> Answer:
        if asked.path == "/latest/api/token":
            if asked.method != "PUT":
                return Answer(405)
            if not 1 <= int(asked.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600:
                return Answer(400)
            token = f"token-{len(self._left)}=="
            self._left[token] = self._token_lasts
            return Answer(200, token)
        token = asked.headers.get("X-aws-ec2-metadata-token", "")
        if self._left.get(token, 0) < 1:
            return Answer(401)
        self._left[token] -= 1
        item = self.items.get(asked.path.removeprefix("/latest/meta-data/"))
        return Answer(404) if item is None else Answer(200, item)


class Gcp(Cloud):
    """Compute Engine's, with long polling; who asks to wait has to be answered by `preempt`, or by its own timeout."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        super().__init__(ahead_s)
        self._preempted = threading.Event()
        self.polled = threading.Event()
        """Somebody waits for a change."""

    def preempt(self) -> None:
        self._preempted.set()

    def answered(self, asked: Asked) -> Answer:
        if asked.headers.get("Metadata-Flavor") != "Google":
            return Answer(403)
        if asked.path != "/computeMetadata/v1/instance/preempted":
            return Answer(404, headers={"Metadata-Flavor": "Google"})
        if asked.query.get("wait_for_change") == "true" and asked.query["last_etag"] == self._etag():
            self.polled.set()
            self._preempted.wait(float(asked.query["timeout_sec"]))
        value = "TRUE" if self._preempted.is_set() else "FALSE"
        return Answer(200, value, {"Metadata-Flavor": "Google", "ETag": self._etag()})

    def _etag(self) -> str:
        return "b411c4a1e7" if self._preempted.is_set() else "0a1b2c3d4e"


class Azure(Cloud):
    """Scheduled events of a scale set that the machine `vmss_1` belongs to."""

    def __init__(self, ahead_s: float = 0.0) -> None:
        super().__init__(ahead_s)
        self.events: list[dict[str, object]] = []
        self.started: list[str] = []

    def schedule(self, event: str, kind: str, machine: str, in_s: float | None) -> None:
        """Schedule an event; None: it has begun."""
        not_before = "" if in_s is None else format_datetime(self.now() + timedelta(seconds=in_s), usegmt=True)
        self.events.append(
            {
                "EventId": event,
                "EventStatus": "Started" if in_s is None else "Scheduled",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": [machine],
                "NotBefore": not_before,
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def answered(self, asked: Asked) -> Answer:
        if asked.headers.get("Metadata") != "true" or "api-version" not in asked.query:
            return Answer(400)
        if asked.path == "/metadata/instance/compute/name" and asked.query.get("format") == "text":
            return Answer(200, "VMSS_1")
        if asked.path != "/metadata/scheduledevents":
            return Answer(404)
        if asked.method == "POST":
            self.started += [request["EventId"] for request in json.loads(asked.body)["StartRequests"]]
            return Answer(200)
        return Answer(200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events}))


@contextmanager
def serving(cloud: Cloud, port: int = 0) -> Iterator[str]:
    """Serve the cloud's metadata on this machine; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(where.query).items()}
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            answer = cloud.answer(Asked(self.command, where.path, query, dict(self.headers), body))
            if answer.raw is not None:
                self.wfile.write(answer.raw)
                return
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body.encode())))
            self.end_headers()
            self.wfile.write(answer.body.encode())

        do_PUT = do_POST = do_GET

        def date_time_string(self, timestamp: float | None = None) -> str:
            return format_datetime(cloud.now(), usegmt=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
