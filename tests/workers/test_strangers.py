"""Nobody uninvited: every call of both services asks for all the keys, a member shows them to members alone, and the
secret is to be read nowhere."""

from __future__ import annotations

import ast
import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import pytest
import ray
import torch

import decentral
from decentral import cli
from decentral.errors import ConfigError, PeerGone, RunError
from decentral.members import Ballot, Members
from decentral.report.live import LiveView
from decentral.wire import FrameError, Header, Packet, Tag, pack_header
from decentral.workers import rpc
from decentral.workers.certs import CA, CERTIFICATE, KEY, Authority, Certificates, issue
from decentral.workers.cluster import host_here
from decentral.workers.coordinator import Coordinator, Entrant
from decentral.workers.coordinator_rpc import CoordinatorClient, CoordinatorServer
from decentral.workers.launch import SECRET_VARIABLE, train
from decentral.workers.rpc import Keys
from decentral.workers.transport import Contact, Transport

SECRET = "0123456789abcdef"
PACKET = Packet("float32", 2, 8, torch.zeros(8, dtype=torch.uint8))
HEADER = pack_header(Header(0, 0, Tag("sync", 1), PACKET.codec, PACKET.numel, PACKET.nbytes))


@dataclass
class Held:
    """Certificates of all sorts; `member` are the run's own."""

    member: Certificates
    folder: Path
    expired: Certificates
    foreign: Certificates
    """Of another authority, whose holder takes the run's authority for good."""
    impostor: Certificates
    """All of it of another authority."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Held:
    folder = tmp_path_factory.mktemp("certs")
    now = datetime.now(timezone.utc)
    authority = Authority(now - timedelta(hours=2), now + timedelta(days=1))
    authority.certify(folder / "member")
    authority.certify(folder / "expired", end=now - timedelta(hours=1))
    issue(folder / "impostor", workers=None, days=1, force=False)
    member, expired, impostor = (files_of(folder / name) for name in ("member", "expired", "impostor"))
    foreign = Certificates(member.authority, impostor.certificate, impostor.key)
    return Held(member, folder / "member", expired, foreign, impostor)


def files_of(folder: Path) -> Certificates:
    """Return what is in the folder, whether it fits or not."""
    return Certificates(*[(folder / name).read_bytes() for name in (CA, CERTIFICATE, KEY)])


class Nobody:
    """Takes packets and forgets them."""

    def begin(self) -> None: ...

    def deliver(self, header: Header, packet: Packet, nbytes: int) -> None: ...

    def end(self) -> None: ...

    def refuse(self, source: int, error: FrameError) -> None: ...


class Door(NamedTuple):
    """One call of one service."""

    service: str
    method: str
    address: str
    kind: str


class House:
    """A coordinator and a worker's transport; `entered` has the methods of which a server has read a request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.doors: list[Door] = []
        self.entered: list[str] = []
        self.coordinator = Coordinator(range(2), silence_s=60.0)
        self._serve = rpc.serve
        monkeypatch.setattr(rpc, "serve", self._watched)

    async def _watched(self, service: str, methods: dict[str, Any], **options: Any) -> tuple[Any, str]:
        def noting(method: str, handler: Any) -> Any:
            def note(data: bytes) -> bytes:
                self.entered.append(method)
                return data

            return handler._replace(request_deserializer=note)

        noted = {method: noting(method, handler) for method, handler in methods.items()}
        server, address = await self._serve(service, noted, **options)
        for method, handler in methods.items():
            sides = [handler.request_streaming, handler.response_streaming]
            kind = "_".join("stream" if streaming else "unary" for streaming in sides)
            self.doors.append(Door(service, method, address, kind))
        return server, address

    @asynccontextmanager
    async def open(self, keys: Keys) -> AsyncIterator[tuple[str, str]]:
        """Both servers; yields the addresses of the coordinator and of the transport."""
        server = CoordinatorServer(self.coordinator, keys)
        transport = Transport(Nobody(), keys=keys, max_packet_bytes=1 << 20, patience_s=20.0)
        addresses = await server.start("127.0.0.1", 0), await transport.start("127.0.0.1")
        transport.admit({0: Contact(0, "unused")})
        try:
            yield addresses
        finally:
            await transport.close()
            await server.stop()


def run(main: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(main, 60)

    asyncio.run(bounded())


async def knock(door: Door, channel: Any, secret: str | None) -> tuple[grpc.StatusCode, str]:
    """Call with a request that is no request; return the answer's status and words."""
    metadata = () if secret is None else Keys(secret).metadata
    call = getattr(channel, door.kind)(f"/{door.service}/{door.method}")
    request = iter([b"\xc1"]) if door.kind.startswith("stream") else b"\xc1"
    try:
        answer = call(request, metadata=metadata, timeout=20)
        await (answer.read() if door.kind.endswith("stream") else answer)
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


def channel_of(address: str, certificates: Certificates | None) -> Any:
    return rpc.dial(address, Keys("unused", certificates))


def without_certificate(address: str, authority: bytes) -> Any:
    options = (("grpc.ssl_target_name_override", "decentral"),)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(authority), options=options)


UNAUTHENTICATED, UNAVAILABLE = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE
SECRETS = {"no secret": None, "empty secret": "", "short of it": SECRET[:-1], "wrong secret": "f" * len(SECRET)}


async def all_refused(house: House, keys: Keys, strangers: dict[str, tuple[Any, str | None, grpc.StatusCode]]) -> None:
    """Let every stranger knock at every door, and then a member."""
    members_doors = {"vote", "watch", "report", "suspect", "leave", "Send", "Beat"}
    assert {door.method for door in house.doors} >= {"join", *members_doors}
    for door in house.doors:
        for name, (dial, secret, refusal) in strangers.items():
            async with dial(door.address) as channel:
                status, words = await knock(door, channel, secret)
            assert status == refusal, (door, name, words)
            assert SECRET not in words
    assert house.entered == []
    assert house.coordinator.members == Members(0, (0, 1))
    assert house.coordinator.poll(0) == {
        "records": [],
        "joined": 0,
        "begun": False,
        "lives": [],
        "members": [],
        "gone": [],
        "news": [],
    }
    for door in house.doors:
        async with rpc.dial(door.address, keys) as channel:
            status, words = await knock(door, channel, SECRET)
        understood = {"Beat": grpc.StatusCode.OK, "Send": grpc.StatusCode.INVALID_ARGUMENT}
        assert status == understood.get(door.method, grpc.StatusCode.FAILED_PRECONDITION), (door, words)
    assert house.entered == [door.method for door in house.doors]


def test_no_call_without_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        house, keys = House(monkeypatch), Keys(SECRET)
        async with house.open(keys):
            strangers = {
                name: (lambda address: channel_of(address, None), secret, UNAUTHENTICATED)
                for name, secret in SECRETS.items()
            }
            await all_refused(house, keys, strangers)

    run(main())


def test_no_call_without_certificates_once_there_are_any(monkeypatch: pytest.MonkeyPatch, held: Held) -> None:
    async def main() -> None:
        house, keys = House(monkeypatch), Keys(SECRET, held.member)
        async with house.open(keys):
            strangers: dict[str, tuple[Any, str | None, grpc.StatusCode]] = {
                name: (lambda address: channel_of(address, held.member), secret, UNAUTHENTICATED)
                for name, secret in SECRETS.items()
            }
            strangers["plaintext"] = (lambda address: channel_of(address, None), SECRET, UNAVAILABLE)
            strangers["no certificate"] = (
                lambda address: without_certificate(address, held.member.authority),
                SECRET,
                UNAVAILABLE,
            )
            strangers["expired"] = (lambda address: channel_of(address, held.expired), SECRET, UNAVAILABLE)
            strangers["foreign"] = (lambda address: channel_of(address, held.foreign), SECRET, UNAVAILABLE)
            await all_refused(house, keys, strangers)

    run(main())


@pytest.mark.parametrize("which", ["expired", "foreign", "impostor", "plaintext"])
def test_a_member_shows_its_secret_to_no_impostor(monkeypatch: pytest.MonkeyPatch, held: Held, which: str) -> None:
    """The impostor even has the secret: what it lacks is a certificate."""

    async def main() -> None:
        house, keys = House(monkeypatch), Keys(SECRET, held.member)
        async with house.open(Keys(SECRET, getattr(held, which, None))) as (coordinator, worker):
            client = CoordinatorClient(coordinator, 0, keys)
            with pytest.raises(RunError, match="did not answer 'leave'") as refused:
                await client.leave(0, [], True, 1.0)
            await client.close()
            sender = Transport(Nobody(), keys=keys, max_packet_bytes=1 << 20, patience_s=20.0)
            sender.admit({1: Contact(0, worker)})
            with pytest.raises(PeerGone, match="worker 1 cannot be reached"):
                await sender.send(1, HEADER, PACKET)
            await sender.close()
            assert house.entered == []
            assert SECRET not in str(refused.value)

    run(main())


@pytest.mark.parametrize("secure", [False, True])
def test_members_get_on_with_each_other(monkeypatch: pytest.MonkeyPatch, held: Held, secure: bool) -> None:
    async def main() -> None:
        house, keys = House(monkeypatch), Keys(SECRET, held.member if secure else None)
        async with house.open(keys) as (coordinator, worker):
            clients = [CoordinatorClient(coordinator, worker, keys) for worker in (0, 1)]
            entrants = [Entrant(worker, 0, "unused", 7, 100) for worker in (0, 1)]
            joined = [client.join(entrant, 10) for client, entrant in zip(clients, entrants, strict=True)]
            assert [welcome.members for welcome in await asyncio.gather(*joined)] == [Members(0, (0, 1))] * 2
            votes = [client.vote(Ballot(worker, "sync", 1, 0, 42), 10) for worker, client in enumerate(clients)]
            assert [decision.outcome for decision in await asyncio.gather(*votes)] == ["committed"] * 2
            for client in clients:
                await client.close()
            sender = Transport(Nobody(), keys=keys, max_packet_bytes=1 << 20, patience_s=20.0)
            sender.admit({1: Contact(0, worker)})
            await sender.send(1, HEADER, PACKET)
            await sender.close()

    run(main())


# Where the secret must not be.


def test_keys_do_not_show_what_they_hold(held: Held) -> None:
    shown = repr(Keys(SECRET, held.member))
    assert SECRET not in shown
    assert repr(held.member.key)[10:60] not in shown


@pytest.mark.parametrize(
    "secret", ["", "fifteen letters"[:15], "sixteen letters!", "sechzehn-zeichen-ü", "a" * 20 + "\n"]
)
def test_a_secret_that_is_too_easy_or_cannot_travel_is_refused(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    with pytest.raises(ConfigError, match=r"DECENTRAL_SECRET: .* at least 16 printable ASCII") as caught:
        train(decentral.read_run(None))
    assert not secret or secret not in str(caught.value)


RUN_FILE = """
steps = 15
batch_size = 1
inner = {{ name = "sgd", lr = 0.1 }}
rule = {{ name = "diloco", period = 5 }}
real = {{ certificates = "{certificates}", port = {port} }}

[task]
name = "tests.workers.faulty_tasks:Faulty"
fault = "{fault}"
at = 12
gate = "{gate}"

[fleet]
workers = [{{ count = 2 }}]
"""


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("fault", "status"), [("", 0), ("raises", 2)])
def test_the_secret_and_the_key_are_to_be_read_nowhere(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    held: Held,
    fault: str,
    status: int,
) -> None:
    """A run over TLS by the command line, that goes well or ends in an error: its files, words, processes and logs."""
    secret = "a-secret-of-" + fault + "-the-users-own"
    with socket.create_server((host_here(), 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    (tmp_path / "run.toml").write_text(
        RUN_FILE.format(certificates=held.folder, port=port, fault=fault, gate=tmp_path / "looked")
    )
    monkeypatch.setattr("sys.argv", ["decentral", "train", str(tmp_path / "run.toml"), "--out", str(tmp_path / "out")])
    seen: list[str] = []
    see = LiveView.see

    def look(view: Any, record: Any) -> None:
        if record.kind == "synced" and not seen:
            seen.append(subprocess.run(["ps", "-eww", "-o", "args="], capture_output=True, text=True).stdout)
            seen.append(repr(ray._private.state.actors()))
            seen.append(asyncio.run(answer_to(Keys(secret, held.member))))
            (tmp_path / "looked").touch()
        see(view, record)

    async def answer_to(keys: Keys) -> str:
        client = CoordinatorClient(rpc.address_of(host_here(), port), 9, keys)
        with pytest.raises(RunError) as refused:
            await client.report(0, [])
        await client.close()
        return str(refused.value)

    monkeypatch.setattr(LiveView, "see", look)
    ended = 0
    try:
        cli.main()
    except SystemExit as end:
        ended = int(end.code or 0)
    printed = capfd.readouterr()
    assert ended == status, printed.err
    processes, actors, answer = seen
    assert answer == "worker 9 is not in the run"  # so this was the run's secret
    assert "decentral-" in actors
    assert "ray::Worker" in processes
    session = Path(ray._private.worker._global_node.get_session_dir_path())  # type: ignore[union-attr]
    files = [path for root in (session, tmp_path) for path in root.rglob("*") if path.is_file()]
    assert {"journal.jsonl", "raylet.out", "gcs_server.out"} <= {path.name for path in files}
    texts = [processes, actors, printed.out, printed.err, *[path.read_bytes().decode("latin1") for path in files]]
    key = held.member.key.decode().splitlines()[1]
    for text in texts:
        assert secret not in text
        assert key not in text


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_without_certificates_ends_the_run_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        RUN_FILE.format(certificates=tmp_path / "none", port=0, fault="", gate=tmp_path / "looked")
    )
    with pytest.raises(ConfigError, match=f"real.certificates: {tmp_path}/none/{CA} on .*: cannot be read"):
        train(decentral.read_run(tmp_path / "run.toml"))


# What could be talked into running code.

UNSAFE = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def unsafe(tree: ast.AST) -> list[str]:
    """Return what in a module makes objects, and so runs code, out of bytes that somebody else wrote."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module or "", *[f"{node.module}.{name.name}" for name in node.names]]
        elif isinstance(node, ast.Attribute):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called == "torch.load" and given.get("weights_only") != "True":
                found.append("pickle: torch.load")
            if given.get("allow_pickle", "False") != "False":
                found.append(f"pickle: {called}")
            found += [
                argument.value
                for argument in node.args
                if called in ("__import__", "import_module", "importlib.import_module")
                and isinstance(argument, ast.Constant)
                and isinstance(argument.value, str)
            ]
    return [name for name in found if UNSAFE & set(name.replace(":", ".").split("."))]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import os, cloudpickle as c",
        "from pickle import loads",
        "from ray import cloudpickle",
        "import ray; ray.cloudpickle.loads(data)",
        "import importlib; importlib.import_module('dill')",
        "__import__('marshal')",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=trusted)",
        "numpy.load(file, allow_pickle=True)",
    ],
)
def test_what_unpickles_is_found(code: str) -> None:
    assert unsafe(ast.parse(code))


def test_nothing_is_ever_unpickled() -> None:
    root = Path(decentral.__file__).parent
    modules = sorted(root.rglob("*.py"))
    assert root / "workers" / "transport.py" in modules
    assert {str(path): found for path in modules if (found := unsafe(ast.parse(path.read_text())))} == {}
    assert not unsafe(ast.parse("torch.load(file, weights_only=True); numpy.load(file, allow_pickle=False)"))
