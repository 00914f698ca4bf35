"""The launch files: each is read by the parser, the provider or the schema that it is for, or really run.

It is handed out like the files with `ray_cluster`, for it starts Rays too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import jsonschema
import pytest
import ray.autoscaler._private.aws.config as ray_on_aws
import typer
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_NAME

from decentral.cli import app
from decentral.config import Run, read_run
from decentral.journal import Joined, Left, read_journal
from tests.worlds.fidelity.namespaces import SUBNET, Cluster, bare_cluster, why_not

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
LAUNCH = (ROOT / "docs" / "launch.md").read_text()


def parsed(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def schema(name: str) -> Any:
    return json.loads((ROOT / "tests/schemas" / name).read_text())


def run_file() -> Run:
    return read_run(DEPLOY / "run.toml")


# -- what the launchers have to agree on -------------------------------------------------------------------------------


def test_every_launcher_brings_as_many_workers_as_the_run_file_wants_and_room_for_each() -> None:
    run, aws, (_, job) = (
        run_file(),
        parsed("aws.yaml"),
        yaml.safe_load_all((DEPLOY / "kubernetes/rayjob.yaml").read_text()),
    )
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert run.real.min_workers is not None
    assert run.real.min_workers < run.fleet.size
    assert run.rule.takes_newcomers
    assert aws["max_workers"] == aws["available_node_types"]["spot"]["max_workers"] == run.fleet.size
    assert group["replicas"] == group["maxReplicas"] == run.fleet.size
    assert f"--num-jobs {run.fleet.size} " in LAUNCH
    assert aws["available_node_types"]["spot"]["resources"] == {"CPU": 4, "GPU": run.real.gpus}
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == run.real.gpus
    assert int(container["resources"]["requests"]["cpu"]) >= run.real.threads


def test_docs_ports_are_those_of_the_files() -> None:
    assert f"| {run_file().real.port} (`real.port`) |" in LAUNCH


def test_the_commands_of_files_and_docs_are_ones_that_decentral_knows() -> None:
    known: Any = typer.main.get_command(app)
    commands = re.findall(r"decentral (?:train|watch|status)[^'`&|\n]*", LAUNCH)
    commands += re.findall(r"^ *decentral train.*", (DEPLOY / "skypilot/head.yaml").read_text(), re.M)
    _, job = yaml.safe_load_all((DEPLOY / "kubernetes/rayjob.yaml").read_text())
    commands.append(job["spec"]["entrypoint"])
    assert len(commands) >= 8
    for command in commands:
        _, name, *words = shlex.split(command)
        known.commands[name].make_context(name, words)  # raises for what it does not know


# -- Ray's launcher on AWS ---------------------------------------------------------------------------------------------


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A simulated EC2 with the default network; Ray's instance profile is there, for it would wait for a new one."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key of its key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        iam, name = boto3.client("iam"), ray_on_aws.DEFAULT_RAY_INSTANCE_PROFILE
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
        yield boto3.client("ec2", region_name=parsed("aws.yaml")["provider"]["region"])


def test_rays_own_aws_provider_makes_the_machines(ec2: Any) -> None:
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    config = prepare_config(
        yaml.safe_load((DEPLOY / "aws.yaml").read_text().replace("ImageId: AMI", f"ImageId: {image}"))
    )
    validate_config(config)
    config = ray_on_aws.bootstrap_aws(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    for kind, fields in config["available_node_types"].items():
        provider.create_node(fields["node_config"], {TAG_RAY_NODE_NAME: kind}, 1)
    made = {
        tag["Value"]: machine
        for reservation in ec2.describe_instances()["Reservations"]
        for machine in reservation["Instances"]
        for tag in machine["Tags"]
        if tag["Key"] == "Name"
    }
    assert {name: machine.get("InstanceLifecycle") for name, machine in made.items()} == {"head": None, "spot": "spot"}
    assert {machine["ImageId"] for machine in made.values()} == {image}
    for machine in made.values():
        (group,) = ec2.describe_security_groups(GroupIds=[machine["SecurityGroups"][0]["GroupId"]])["SecurityGroups"]
        from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
        assert [(rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [(22, 22)]


# -- SkyPilot and KubeRay ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["head", "worker"])
def test_skypilots_schema_accepts_the_task(name: str) -> None:
    task, skypilot = parsed(f"skypilot/{name}.yaml"), schema("skypilot.json")
    jsonschema.validate(task, skypilot["task"])
    jsonschema.validate(task["resources"], skypilot["resources"])
    assert task["resources"]["use_spot"] is (name == "worker")
    with pytest.raises(jsonschema.ValidationError, match="spot"):
        jsonschema.validate({**task["resources"], "spot": True}, skypilot["resources"])


def test_skypilots_machines_are_of_one_site() -> None:
    head, worker = parsed("skypilot/head.yaml"), parsed("skypilot/worker.yaml")
    assert head["resources"]["infra"] == worker["resources"]["infra"]


def test_kuberays_schema_accepts_the_job() -> None:
    volume, job = yaml.safe_load_all((DEPLOY / "kubernetes/rayjob.yaml").read_text())
    jsonschema.validate(job, schema("rayjob.json"))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert [one["persistentVolumeClaim"] for one in head["volumes"] if one["name"] == "runs"] == [
        {"claimName": volume["metadata"]["name"]}
    ]
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        jsonschema.validate(job, schema("rayjob.json"))


def test_image_and_constraints_have_the_same_ray() -> None:
    (pinned,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)
    _, job = yaml.safe_load_all((DEPLOY / "kubernetes/rayjob.yaml").read_text())
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned
    assert f"FROM rayproject/ray:{pinned}-" in (DEPLOY / "kubernetes/Dockerfile").read_text()


# -- shell -------------------------------------------------------------------------------------------------------------


def scripts() -> dict[str, str]:
    aws, tasks = parsed("aws.yaml"), {name: parsed(f"skypilot/{name}.yaml") for name in ("head", "worker")}
    lines = [line for key, lines in aws.items() if key.endswith("_commands") for line in lines]
    return {
        "cluster.sh": (DEPLOY / "ssh/cluster.sh").read_text(),
        "aws": "#!/bin/bash\n" + "\n".join(lines),
        **{name: f"#!/bin/bash\n{task['setup']}{task['run']}" for name, task in tasks.items()},
    }


@pytest.mark.parametrize("name", scripts())
def test_shellcheck_finds_nothing(name: str) -> None:
    command = [Path(sys.executable).with_name("shellcheck"), "-"]
    if name != "cluster.sh":
        command += ["--exclude=SC2016,SC2154"]  # variables that the launcher, or a later shell, has
    done = subprocess.run(command, input=scripts()[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# -- machines of one's own ---------------------------------------------------------------------------------------------


class Hosts:
    """Hosts that `ssh` reaches: what stands in for it runs the words, as sshd would, in a shell of the host's own."""

    def __init__(self, folder: Path, names: list[str], cluster: Cluster | None = None) -> None:
        self.folder = folder
        for name in names:
            self.home(name).mkdir()
        (folder / "hosts").write_text("".join(f"{name} {SUBNET}.{10 + i}\n" for i, name in enumerate(names)))
        (folder / "deploy").symlink_to(DEPLOY)
        for i, name in enumerate(names):
            inside = f"ip netns exec {cluster.space(i)} " if cluster else ""
            variables = f"HOME={self.home(name)} RAY_TMPDIR={self.home(name)} PATH={os.environ['PATH']}"
            command = f'exec {inside}env -i {variables} PYTHONPATH={ROOT} PIP_NO_INDEX=1 bash -c "$*"\n'
            (self.home(name) / "shell").write_text(f"cd {self.home(name)}\n{command}")
        ssh = folder / "bin" / "ssh"
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/bash\nhost=$1\nshift\nexec bash "{folder}/$host/shell" "$@"\n')
        ssh.chmod(0o755)
        self._env = {**os.environ, "PATH": f"{ssh.parent}:{os.environ['PATH']}"}

    def home(self, name: str) -> Path:
        return self.folder / name

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, cwd=self.folder, env=self._env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def do(self, *words: str, timeout_s: float = 120.0) -> str:
        """Run a command here; return what it printed. Raises `AssertionError` with it if the command failed."""
        done = self.begin(*words)
        out, _ = done.communicate(timeout=timeout_s)
        assert done.returncode == 0, out
        return out


def documented(first: str) -> list[str]:
    """Return the words of the one documented command of `cluster.sh` that begins so."""
    (line,) = re.findall(rf"^    (deploy/ssh/cluster\.sh {first}.*)$", LAUNCH, re.M)
    return shlex.split(line)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose path is short: Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="dc", ignore_cleanup_errors=True) as path:
        yield Path(path)


def test_install_puts_the_wheels_on_a_host_and_replaces_what_was_there(folder: Path) -> None:
    hosts = Hosts(folder, ["one"])
    (folder / "dist").mkdir()
    shutil.copy(ROOT / "constraints.txt", folder / "dist")
    for answer in ("41", "42"):
        make_wheel(folder / "dist" / "tried-1-py3-none-any.whl", {"tried.py": f"print({answer})\n"})
        hosts.do(*documented("install"))
        assert hosts.do("ssh", "one", "decentral/venv/bin/python -m tried").strip() == answer


def make_wheel(path: Path, files: dict[str, str]) -> None:
    """Write a wheel; pip asks for no more than this."""
    info = "-".join(path.name.split("-")[:2]) + ".dist-info"
    name, version = path.name.split("-")[:2]
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": "".join(f"{file},,\n" for file in files)}.items():
            archive.writestr(file, text)


@pytest.mark.parametrize(
    ("lines", "words", "message"),
    [
        ("", ["start"], "there is no host in it"),
        ("lonely\n", ["start"], "'lonely' is no destination and an address"),
        ("one 10.0.0.1\n", ["start", "two"], "two is not among the hosts"),
        ("one 10.0.0.1\n", ["begin"], "'begin' is none of install, start, on-head, stop"),
        ("one 10.0.0.1\n", ["install"], "name the folder with the wheels and constraints.txt"),
    ],
)
def test_a_wrong_call_ends_with_one_message(tmp_path: Path, lines: str, words: list[str], message: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(lines)
    done = subprocess.run(
        [DEPLOY / "ssh/cluster.sh", words[0], hosts, *words[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def listening(pids: list[int]) -> set[int]:
    """Return the TCP ports of a namespace that others can reach; `pids` are its processes."""
    ports = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pids[0]}/net/{table}").read_text().splitlines()[1:]:
            address, port = line.split()[1].split(":")
            if line.split()[3] == "0A" and not address.endswith("0100007F"):
                ports.add(int(port, 16))
    return ports


def documented_ports(head: bool) -> set[int]:
    """Return the ports of the documented table, the range that this kernel hands out included."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = set(range(low, high + 1))
    for cell in re.findall(r"^\| (.*?) \| (?:all|head) \|" if head else r"^\| (.*?) \| all \|", LAUNCH, re.M):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", cell):
            ports |= set(range(int(first), int(last or first) + 1))
    return ports


def wait_for(journal: Path, what: type[Joined] | type[Left], count: int, driver: subprocess.Popen[str]) -> None:
    """Wait until a journal has so many of these records."""
    deadline = time.monotonic() + 90.0
    while time.monotonic() < deadline and driver.poll() is None:
        if journal.exists() and sum(isinstance(record, what) for record in read_journal(journal)) >= count:
            return
        time.sleep(0.2)
    driver.kill()
    pytest.fail(f"{what.__name__}: fewer than {count} in the journal\n{driver.communicate()[0]}")


@pytest.mark.slow
def test_a_run_on_hosts_of_ones_own_goes_on_when_one_goes_and_takes_it_back(folder: Path) -> None:
    """The documented commands, in their order, on two hosts that are network namespaces."""
    if reason := why_not():
        pytest.skip(reason)
    with bare_cluster(nodes=1) as cluster:
        hosts = Hosts(folder, ["head", "ann@first.example"], cluster)
        for name in ("head", "ann@first.example"):
            (hosts.home(name) / "decentral" / "dist").mkdir(parents=True)
            (hosts.home(name) / "decentral" / "venv").symlink_to(Path(sys.executable).parent.parent)
            shutil.copy(DEPLOY / "run.toml", hosts.home(name) / "decentral" / "dist")
        hosts.do(*documented("start hosts$"))
        token = hosts.home("head") / "decentral" / "token"
        assert stat.S_IMODE(token.stat().st_mode) == stat.S_IMODE((folder / "hosts.token").stat().st_mode) == 0o600
        assert len(token.read_text().strip()) == 64
        assert "Node status" in hosts.do(*documented("on-head hosts ray status"))
        with pytest.raises(AssertionError, match=r"(?i)auth"):
            hosts.do(
                "ssh",
                "ann@first.example",
                f"RAY_AUTH_MODE=disabled decentral/venv/bin/ray status --address {SUBNET}.10:6379",
            )

        hurry, journal = folder / "hurry", hosts.home("head") / "decentral/first/journal.jsonl"
        # One worker a host, on its processors; else it is the documented run.
        settings = [
            "fleet.workers=[{count = 2}]",
            "real.gpus=0",
            f"real.threads={os.cpu_count()}",
            "real.min_workers=1",
        ]
        settings += ["steps=5000", "task.name=tests.dawdling:Dawdling", f"task.hurry={hurry}"]
        sets = [word for setting in settings for word in ("--set", setting)]
        driver = hosts.begin(*documented("on-head hosts decentral train"), *sets)
        wait_for(journal, Joined, 2, driver)
        for node in range(2):
            ports = listening(cluster.pids(node))
            assert ports - documented_ports(head=node == 0) == set()
            assert 6380 in ports
        hosts.do(*documented("stop hosts ann"))
        assert cluster.pids(1) == []
        wait_for(journal, Left, 1, driver)
        hosts.do(*documented("start hosts ann"))
        wait_for(journal, Joined, 3, driver)
        hurry.touch()
        out, _ = driver.communicate(timeout=120.0)
        assert driver.returncode == 0, out
        reasons = sorted(record.reason for record in read_journal(journal) if isinstance(record, Left))
        assert reasons == ["finished", "finished", "preempted"]
        assert (journal.parent / "model.safetensors").exists()

        hosts.do(*documented("stop hosts$"))
        assert cluster.pids(0) == cluster.pids(1) == []
