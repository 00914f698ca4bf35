"""How small, how fast and how true the codecs are, beside those of hivemind and bitsandbytes.

    python -m benchmarks.codecs [codec ...]

A vector of 10 million float32 is encoded and decoded on one core, by all codecs in turn, several times. Printed are
bits on the wire for a parameter, megabytes of float32 encoded and decoded in a CPU second (median and fastest turn),
and the relative L2 error on normal and on Student-t elements with 3 degrees of freedom. Codecs that look at rows and
columns see a matrix. If the peers' environment is there (`python -m benchmarks.peers hivemind` makes it), they take
turns too, on the same vector in a process of their own, and ratios of speeds within a turn follow.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import python_of
from decentral.protocols.codecs import CODECS, Codec, Wrapper

ROWS, COLUMNS = 2500, 4000
MEGABYTES = 4e-6 * ROWS * COLUMNS
TURNS = 7
PAIRS = (
    ("f16", "hivemind Float16"),
    ("int8", "hivemind Uniform8Bit"),
    ("dynamic8", "hivemind Quantile8Bit"),
    ("dynamic8", "bitsandbytes blockwise"),
)
Turn = dict[str, list[float]]
"""Seconds to encode and to decode, by codec."""


class Peers:
    """The other projects' codecs, in a process of their own."""

    def __init__(self, python: Path, vector: Path) -> None:
        script = Path(__file__).parent / "peer" / "hivemind_codecs.py"
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([python, script, vector], text=True, **pipes)
        self.measures: dict[str, list[float]] = self._answer()

    def turn(self) -> Turn:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return dict(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def error(codec: Codec, values: Tensor) -> float:
    return float((codec.round_trip(values) - values).norm() / values.norm())


def our_turn(codecs: dict[str, Codec], values: Tensor) -> Turn:
    turn = {}
    for name, codec in codecs.items():
        began = time.process_time()
        packet = codec.encode(values)
        encoded = time.process_time()
        codec.decode(packet, values)
        turn[name] = [encoded - began, time.process_time() - encoded]
    return turn


def speed(turns: list[Turn], name: str, side: int) -> str:
    seconds = [turn[name][side] for turn in turns]
    return f"{MEGABYTES / statistics.median(seconds):7.0f} {MEGABYTES / min(seconds):7.0f}"


def main() -> None:
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or [name for name, codec in CODECS.items() if not issubclass(codec, Wrapper)]
    codecs = {name: CODECS[name]().fit([(ROWS, COLUMNS)]) for name in wanted}
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(ROWS * COLUMNS, dtype=np.float32)
    student = torch.from_numpy(rng.standard_t(3, ROWS * COLUMNS).astype(np.float32))
    values, python = torch.from_numpy(normal), python_of("hivemind")
    measures = {
        name: [8 * codec.wire_bytes(values.numel()) / values.numel(), error(codec, values), error(codec, student)]
        for name, codec in codecs.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "vector.npy", normal)
        peers = Peers(python, Path(folder) / "vector.npy") if python else None
        turns = [our_turn(codecs, values) | (peers.turn() if peers else {}) for _ in range(TURNS)]
        if peers:
            measures.update(peers.measures)
            peers.close()
    print(f"{'':24}{'bits':>6}  {'encode MB/s':>15}  {'decode MB/s':>15}  error: normal, Student-t3")
    for name, (bits, *errors) in measures.items():
        told = "  ".join(f"{each:8.5f}" for each in errors)
        print(f"{name:24}{bits:6.2f}  {speed(turns, name, 0)}  {speed(turns, name, 1)}  {told}")
    if not python:
        print("no peers: python -m benchmarks.peers hivemind makes their environment")
        return
    for mine, theirs in PAIRS:
        if mine in codecs:
            both = [[turn[theirs][side] / turn[mine][side] for turn in turns] for side in (0, 1)]
            spread = [f"{statistics.median(all_):.2f} ({min(all_):.2f} to {max(all_):.2f})" for all_ in both]
            print(f"{mine} is {spread[0]} times as fast as {theirs} at encoding, {spread[1]} times at decoding")


if __name__ == "__main__":
    main()
