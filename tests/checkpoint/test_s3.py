"""Checkpoints in an object store: moto's server, which speaks S3 over HTTP, on this machine."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from shelf import OWNER, draft, fleet, same, snapshot, written

from decentral.checkpoint import Archive, Storage, StorageError, load, newest
from decentral.errors import ConfigError

ACCESS = {"key": "test", "secret": "test"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def storage(server: str, request: pytest.FixtureRequest) -> Storage:
    bucket = f"b{abs(hash(request.node.name))}"
    fsspec.filesystem("s3", endpoint_url=server, **ACCESS).mkdir(bucket)
    return Storage(f"s3://{bucket}/run", endpoint_url=server, **ACCESS)


def test_written_found_read_and_removed(storage: Storage) -> None:
    Archive(storage, OWNER, 2).claim(resume=False)
    folders = [written(storage, fleet(step)) for step in (3, 6, 9)]
    found = newest(storage)
    assert found is not None
    assert found.folder == folders[-1]
    assert all(same(load(storage, found, worker), each) for worker, each in fleet(9).items())
    assert {name.split("/")[0] for name in storage.sizes()} == {*folders[1:], "owner.json"}


def test_a_file_of_several_parts(storage: Storage) -> None:
    """Above 8 MiB an upload has several requests, and the file is there with the last one."""
    large = snapshot(2, params=torch.randn(5_000_000, generator=torch.Generator().manual_seed(3)))
    Archive(storage, OWNER, 2).claim(resume=False)
    written(storage, {0: large})
    found = newest(storage)
    assert found is not None
    assert same(load(storage, found, 0), large)


def test_an_object_without_a_manifest_and_one_that_was_cut_are_passed_over(storage: Storage) -> None:
    Archive(storage, OWNER, 2).claim(resume=False)
    older, cut = written(storage, fleet(3)), written(storage, fleet(6))
    name = f"{cut}/worker-0.safetensors"
    storage.put(name, storage.read(name)[:-1])
    unfinished = Archive(storage, OWNER, 2).next_folder()
    draft(storage, unfinished, fleet(9))
    found = newest(storage)
    assert found is not None
    assert found.folder == older
    assert found.passed_over[unfinished] == "it has no manifest: it was never finished"
    assert "worker-0.safetensors has" in found.passed_over[cut]


def test_two_runs_do_not_share_a_place(storage: Storage) -> None:
    Archive(storage, OWNER, 2).claim(resume=False)
    with pytest.raises(ConfigError, match="holds another run's checkpoints"):
        Archive(storage, "cafe", 2).claim(resume=False)


def test_a_bucket_that_is_not_there(server: str) -> None:
    storage = Storage("s3://nobody-made-this/run", endpoint_url=server, **ACCESS)
    with pytest.raises(StorageError, match="s3://nobody-made-this/run: cannot "):
        Archive(storage, OWNER, 2).claim(resume=False)


def test_an_upload_that_fails_half_way_leaves_no_object(storage: Storage) -> None:
    """Whoever feeds it fails after two parts have gone out: closing the file would make an object of these."""

    def pieces() -> Iterator[bytes]:
        yield bytes(20 << 20)
        raise OSError("the disk is gone")

    with pytest.raises(StorageError, match=r"cannot write 1/worker-0.safetensors: the disk is gone"):
        storage.write("1/worker-0.safetensors", pieces())
    assert storage.sizes() == {}


def test_a_server_that_goes_away_in_the_midst_of_an_upload(server: str, storage: Storage) -> None:
    """A relay that is closed after 12 MiB stands between: an error, in bounded time, and no object."""
    host, port = server.removeprefix("http://").split(":")
    relay = Relay((host, int(port)), limit=12 << 20)
    bucket = storage.url.split("/")[2]
    flaky = Storage(
        f"s3://{bucket}/flaky",
        endpoint_url=f"http://127.0.0.1:{relay.port}",
        config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2, "read_timeout": 2},
        **ACCESS,
    )
    with pytest.raises(StorageError, match=r"cannot write 1/worker-0.safetensors"):
        flaky.write("1/worker-0.safetensors", (bytes(4 << 20) for _ in range(12)))
    relay.close()
    assert storage.sizes() == {}


class Relay:
    """Passes bytes between who connects and `target`, until `limit` of them have gone there; then it is gone."""

    def __init__(self, target: tuple[str, int], limit: int) -> None:
        self._target, self._left = target, limit
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._left = 0
        for each in (self._listener, *self._open):
            with_no_complaint(each)

    def _accept(self) -> None:
        try:
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._open += [near, far]
                threading.Thread(target=self._pass, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(far, near, False), daemon=True).start()
        except OSError:
            return

    def _pass(self, source: socket.socket, target: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if counted:
                    self._left -= len(data)
                    if self._left <= 0:
                        self.close()
                        return
                target.sendall(data)
        except OSError:
            return


def with_no_complaint(each: socket.socket) -> None:
    try:
        each.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        each.close()
