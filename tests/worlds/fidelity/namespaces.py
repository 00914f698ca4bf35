"""A real Ray cluster whose nodes are network namespaces with thin links, all on this machine. Needs root and iproute2.

Every node has a veth pair into one bridge. `tc tbf` limits what leaves the node at its own end and what reaches it at
the bridge's end; the head, where Ray's services, the coordinator and the driver live, is not limited. Nodes hand frames
over one by one, as they are on a real line: by default a veth takes up to 64 KiB from TCP at a time, and a short queue
that has no room for them drops them all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

OVERHEAD = 66 / 1514
"""What headers are of an Ethernet frame full of TCP's payload; `tbf` counts frames."""
BURST = "32kb"
"""What `tbf` lets through at once: little beside a message, enough for one turn of the scheduler."""
QUEUE = "10ms"
"""How long the longest queue at a line takes to drain. Flows share a line about evenly if queues are short, as the
simulator assumes; where they are long, whoever has filled one keeps it (docs/fidelity.md has figures)."""
CONGESTION_CONTROL = "cubic"
"""What most senders of the internet use, whatever this machine prefers."""
START_S = 60.0
PORT = 6379
SUBNET = "10.77.0"
_NOTHING: Mapping[int, Mapping[str, str]] = {}
_RAY = str(Path(sys.executable).with_name("ray"))
_RAY_START = (_RAY, "start", "--disable-usage-stats", "--include-log-monitor=false")
"""Nobody here reads logs through Ray, and its log monitors, one for each machine, would share this one's cores."""


class Cluster:
    """Some nodes besides the head, each good for one worker. `own` are environment variables of single nodes."""

    def __init__(self, name: str, nodes: int, folder: Path, own: Mapping[int, Mapping[str, str]]) -> None:
        self._name, self._nodes, self._own = name, nodes, own
        self._env = {
            **os.environ,
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "the token of a cluster in namespaces",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def limit(self, mbit: float) -> None:
        """Let every node send and receive at most so many Mbit/s."""
        for node in range(1, self._nodes + 1):
            self.limit_node(node, mbit)

    def limit_node(self, node: int, mbit: float) -> None:
        """Let one node send and receive at most so many Mbit/s."""
        tbf = ("root", "tbf", "rate", f"{mbit:g}mbit", "burst", BURST, "latency", QUEUE)
        self._inside(self.space(node), "tc", "qdisc", "replace", "dev", "eth", *tbf)
        self._inside(self.space(0), "tc", "qdisc", "replace", "dev", f"port{node}", *tbf)

    def train(self, run_file: Path, out: Path, timeout_s: float) -> None:
        """Run `decentral train` on the cluster, in the head's namespace."""
        self._inside(self.space(0), *_train_command(run_file, out), timeout_s=timeout_s)

    def begin_training(self, run_file: Path, out: Path) -> subprocess.Popen[bytes]:
        """Begin to run `decentral train` in the head's namespace; what it prints goes to the file `out` + ".log"."""
        with out.with_suffix(".log").open("wb") as log:
            command = ("ip", "netns", "exec", self.space(0), *_train_command(run_file, out))
            return subprocess.Popen(command, env=self._env, stdout=log, stderr=subprocess.STDOUT)

    def start(self) -> None:
        at_head = ("--head", f"--node-ip-address={SUBNET}.10", f"--port={PORT}", "--include-dashboard=false")
        self._inside(self.space(0), *_RAY_START, *at_head, "--num-cpus=0", timeout_s=START_S)
        for node in range(1, self._nodes + 1):
            self.boot(node)

    def boot(self, node: int) -> None:
        """Start Ray on a node where it does not run."""
        where = (f"--address={SUBNET}.10:{PORT}", f"--node-ip-address={SUBNET}.{10 + node}")
        own = [f"{name}={value}" for name, value in self._own.get(node, {}).items()]
        self._inside(self.space(node), "env", *own, *_RAY_START, *where, "--num-cpus=1", timeout_s=START_S)

    def drain(self, node_id: str, seconds: int) -> None:
        """Have Ray told that the machine of the node, by Ray's own name for it, will go in so many seconds."""
        reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test")
        which = (f"--address={SUBNET}.10:{PORT}", "--node-id", node_id, "--deadline-remaining-seconds", str(seconds))
        self._inside(self.space(0), _RAY, "drain-node", *which, *reason)

    def stop(self) -> None:
        """Kill everything that runs in the namespaces."""
        for node in range(self._nodes + 1):
            self.crash(node)

    def crash(self, node: int) -> None:
        """Kill everything that runs on a node, Ray and all."""
        for pid in self.pids(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids(self, node: int) -> list[int]:
        """Return the processes of a node."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.space(node)).split()]

    def cut(self, node: int) -> None:
        """Nothing reaches the node any more, and nothing leaves it."""
        _run("ip", "-n", self.space(0), "link", "set", f"port{node}", "down")

    def heal(self, node: int) -> None:
        """The node's line is up again."""
        _run("ip", "-n", self.space(0), "link", "set", f"port{node}", "up")

    def space(self, node: int) -> str:
        """Return the namespace that is the node; 0 is the head."""
        return f"{self._name}-{node}"

    def _inside(self, space: str, *command: str, timeout_s: float = 20.0) -> str:
        return _run("ip", "netns", "exec", space, *command, env=self._env, timeout_s=timeout_s)


def _train_command(run_file: Path, out: Path) -> tuple[str, ...]:
    command = (sys.executable, "-m", "decentral.cli", "train", str(run_file), "--out", str(out), "--json")
    return (*command, "--address", f"{SUBNET}.10:{PORT}")


def why_not() -> str:
    """Return what this machine lacks for such a cluster; nothing if it can have one."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    name = f"dc{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        _run(
            "ip",
            "netns",
            "exec",
            name,
            "tc",
            "qdisc",
            "add",
            "dev",
            "lo",
            *["root", "tbf", "rate", "1mbit", "burst", "32kb"],
            "latency",
            "9ms",
        )
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces with tc tbf: {getattr(error, 'stderr', None) or error}"
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return ""


@contextmanager
def cluster(nodes: int, own: Mapping[int, Mapping[str, str]] = _NOTHING) -> Iterator[Cluster]:
    """A Ray cluster of a head and so many nodes; nothing of it is left afterwards."""
    with bare_cluster(nodes, own) as made:
        made.start()
        yield made


@contextmanager
def bare_cluster(nodes: int, own: Mapping[int, Mapping[str, str]] = _NOTHING) -> Iterator[Cluster]:
    """A head and so many nodes where nothing runs yet; whatever runs there at the end is killed."""
    name = f"dc{os.getpid()}"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dc", ignore_cleanup_errors=True)))
        for node in range(nodes + 1):
            _run("ip", "netns", "add", f"{name}-{node}")
            stack.callback(_run, "ip", "netns", "del", f"{name}-{node}")
            _run("ip", "-n", f"{name}-{node}", "link", "set", "lo", "up")
        head = f"{name}-0"
        _run("ip", "-n", head, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", head, "addr", "add", f"{SUBNET}.10/24", "dev", "bridge")
        _run("ip", "-n", head, "link", "set", "bridge", "up")
        for node in range(1, nodes + 1):
            port, space = f"port{node}", f"{name}-{node}"
            _run("ip", "-n", head, "link", "add", port, "type", "veth", "peer", "name", "eth", "netns", space)
            _run("ip", "-n", head, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", space, "addr", "add", f"{SUBNET}.{10 + node}/24", "dev", "eth")
            _run("ip", "-n", space, "link", "set", "eth", "up", "gso_max_segs", "1")
            route = (f"{SUBNET}.0/24", "dev", "eth", "proto", "kernel", "scope", "link")
            _run("ip", "-n", space, "route", "replace", *route, "congctl", CONGESTION_CONTROL)
        made = Cluster(name, nodes, folder, own)
        stack.callback(made.stop)
        yield made


def _run(*command: str, env: dict[str, str] | None = None, timeout_s: float = 20.0) -> str:
    done = subprocess.run(command, env=env, timeout=timeout_s, check=False, capture_output=True, text=True)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout
