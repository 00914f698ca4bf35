"""A Ray whose workers are forked from one process that has imported what all of them import.

Ray starts each worker as a new Python, which computes for seconds before it is asked anything, most of them to import
torch. Here Ray is told of a shell script instead of Python: it passes the worker's command line, environment and output
on to this module as a program, the zygote, which forks, and the child runs Ray's own `default_worker.py` with them.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

LAUNCHER = """#!/bin/sh
case "$1" in
    */default_worker.py) exec {python} -I -S -c {client} {place} "$@" ;;
    *) exec {python} "$@" ;;
esac
"""
CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as zygote:
    zygote.connect(sys.argv[1])
    socket.send_fds(zygote, [b" "], [0, 1, 2])
    zygote.sendall(json.dumps([sys.argv[2:], dict(os.environ), os.getcwd()]).encode())
"""
IMPORTED = (
    "ray._private.workers.default_worker",
    "decentral.workers.actor",
    "decentral.workers.coordinator_actor",
    "torch._dynamo",  # which torch imports when a model is cut into stages
)


@contextmanager
def forking_ray(cpus: int) -> Iterator[None]:
    """A Ray of this process alone, with so many logical CPUs, whose workers are forked."""
    from decentral.workers.cluster import local_ray

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        python, place, launcher = sys.executable, folder / "zygote", folder / "python"
        words = {"python": python, "client": CLIENT, "place": str(place)}
        launcher.write_text(LAUNCHER.format(**{key: shlex.quote(word) for key, word in words.items()}))
        launcher.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(place))
            listening.listen(64)
            number = listening.fileno()
            stack.enter_context(  # it ends when its input does: now or, if this process is killed, then
                subprocess.Popen(
                    [python, __file__, str(number)], stdin=subprocess.PIPE, pass_fds=[number], start_new_session=True
                )
            )
        sys.executable = str(launcher)  # which Ray has its raylet start workers with
        try:
            stack.enter_context(local_ray(cpus))
        finally:
            sys.executable = python
        yield


def main(listening: socket.socket) -> None:
    """Fork for whoever asks until there is no more input; a child returns when it is done."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    wanted = _next(listening)
    if wanted is not None:
        os.environ.update(wanted.environment)  # Ray reads it when it is imported
        for module in IMPORTED:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # or each child's first collection copies all of it
    while wanted is not None:
        if os.fork() == 0:
            listening.close()
            wanted.begin()
            return
        wanted.close()
        wanted = _next(listening)


def _next(listening: socket.socket) -> Wanted | None:
    ready, _, _ = select.select([listening, sys.stdin], [], [])
    return Wanted(listening) if listening in ready else None


class Wanted:
    """A worker that Ray wants: its command line, its environment, where it runs, and its three standard files."""

    def __init__(self, listening: socket.socket) -> None:
        with closing(listening.accept()[0]) as client:
            _, self._files, _, _ = socket.recv_fds(client, 1, 3)
            with client.makefile("rb") as stream:
                self._words, self.environment, self._folder = json.load(stream)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            os.close(file)

    def begin(self) -> None:
        """Be that worker in this process, until it is done."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)  # as Ray has each of its workers
        for number, file in enumerate(self._files):
            os.dup2(file, number)
        self.close()
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self._folder)
        sys.argv, sys.path[0] = self._words, str(Path(self._words[0]).parent)
        runpy.run_path(self._words[0], run_name="__main__")


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
