"""Which worker a process is, and where the coordinator listens: from arguments and from the environment."""

from __future__ import annotations

from typing import Any

import pytest

import decentral
from decentral.embedded.whereabouts import Wishes, host_and_port, whereabouts
from decentral.errors import ConfigError

SECRET = "0123456789abcdef"
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "2", "SLURM_NTASKS": "3", "DECENTRAL_ADDRESS": "127.0.0.1:29600"}
OURS = {"DECENTRAL_WORKER": "0", "DECENTRAL_WORKERS": "2", "DECENTRAL_ADDRESS": "127.0.0.1:29700"}
KEY = {"DECENTRAL_SECRET": SECRET}


@pytest.mark.parametrize(
    ("wishes", "environment", "worker", "workers", "port"),
    [
        (Wishes(), TORCHRUN, 1, 4, 29501),  # the port after that of torchrun's own store
        (Wishes(), SLURM, 2, 3, 29600),
        (Wishes(), TORCHRUN | SLURM, 1, 4, 29600),
        (Wishes(), TORCHRUN | SLURM | OURS, 0, 2, 29700),
        (Wishes(worker=3, workers=5, address="127.0.0.1:1"), TORCHRUN | OURS, 3, 5, 1),
    ],
    ids=["torchrun", "Slurm", "torchrun under Slurm", "our own variables", "arguments"],
)
def test_the_nearest_word_counts(
    wishes: Wishes, environment: dict[str, str], worker: int, workers: int, port: int
) -> None:
    here = whereabouts(wishes, environment | KEY, fleet=None, shared=False)
    assert (here.worker, here.workers, here.address, here.host) == (worker, workers, ("127.0.0.1", port), "127.0.0.1")
    assert here.secret == SECRET


def test_the_run_file_says_how_many_workers_there_are_if_nobody_else_does() -> None:
    assert whereabouts(Wishes(worker=6), {"DECENTRAL_ADDRESS": "127.0.0.1:1"} | KEY, fleet=7, shared=False).workers == 7


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        ({}, {}, r"workers: missing; give join\(workers=...\), or set DECENTRAL_WORKERS or WORLD_SIZE or SLURM_NTASKS"),
        ({"WORLD_SIZE": "2"}, {}, r"worker: missing; give join\(worker=...\), or set DECENTRAL_WORKER or RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, {}, r"address: missing; set DECENTRAL_ADDRESS"),
        (TORCHRUN, {}, r"secret: missing; set DECENTRAL_SECRET"),
        (TORCHRUN | {"DECENTRAL_SECRET": "short"}, {}, r"at least 16 printable .*; give all workers the same one"),
        (TORCHRUN | {"RANK": "4"}, {}, r"worker: 4, but there are 4 workers, which are numbered 0 to 3"),
        (TORCHRUN | {"RANK": "first"}, {}, r"RANK: 'first' must be a whole number"),
        (TORCHRUN, {"fleet": 2}, r"workers: 4, but the run file's fleet has 2"),
        # Where ranks share a replica, torchrun numbers the ranks.
        (TORCHRUN | KEY, {"shared": True}, r"workers: missing; .* or set DECENTRAL_WORKERS$"),
        (TORCHRUN | OURS | {"DECENTRAL_ADDRESS": "here"} | KEY, {}, r"address: 'here' must be host:port"),
        (OURS | {"DECENTRAL_APART": "yes"} | KEY, {}, r"DECENTRAL_APART: 'yes' must be 1 where `decentral coordinate`"),
    ],
)
def test_what_is_missing_or_wrong_is_said(environment: dict[str, str], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        whereabouts(Wishes(), environment, **{"fleet": None, "shared": False, **settings})
    assert "short" not in str(caught.value)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"worker": 2, "workers": 2}, r"worker: 2, but there are 2 workers"),
        ({"address": "here"}, r"address: 'here' must be host:port"),
        ({"secret": "short"}, r"at least 16 printable .*; give all workers the same one"),
    ],
)
def test_what_an_argument_has_wrong_is_said_by_join_itself(wishes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        decentral.join(**wishes)


@pytest.mark.parametrize(
    ("wish", "environment", "apart"),
    [(None, {}, False), (None, {"DECENTRAL_APART": "1"}, True), (False, {"DECENTRAL_APART": "1"}, False)],
)
def test_the_coordinator_is_apart_if_somebody_says_so(
    wish: bool | None, environment: dict[str, str], apart: bool
) -> None:
    assert whereabouts(Wishes(apart=wish), OURS | KEY | environment, fleet=None, shared=False).apart is apart


@pytest.mark.parametrize(
    ("address", "parts"),
    [("10.0.0.1:29600", ("10.0.0.1", 29600)), ("[::1]:5", ("::1", 5)), ("a.example:1", ("a.example", 1))],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert host_and_port(address) == parts


@pytest.mark.parametrize("address", ["10.0.0.1", ":29600", "a:0", "a:65536", "a:b"])
def test_wrong_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match="must be host:port"):
        host_and_port(address)
