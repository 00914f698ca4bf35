"""The commands that README and docs tell people to type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
)

OURS = ("decentral", "python", "make", "pytest", "pip")
"""Programs that a test can do something with."""
FOREIGN = {
    "aws": "an account at Amazon",
    "ray": "machines at Amazon; the cluster's file is read by Ray's own code in tests/test_deploy.py",
    "sky": "a cloud; both tasks are held to SkyPilot's schema in tests/test_deploy.py",
    "kubectl": "Kubernetes; the job is held to KubeRay's schema in tests/test_deploy.py",
    "docker": "a registry; the image's versions are checked in tests/test_deploy.py",
    "ssh": "a machine in a cloud",
    "scp": "a machine in a cloud",
    "deploy/ssh/cluster.sh": "run as documented, on two hosts in network namespaces, by tests/test_deploy.py",
    "torchrun": "run as documented by tests/embedded/test_page.py",
    "sbatch": "a cluster with Slurm",
    "python3": "makes what the suite runs in",
    ".venv/bin/pip": "makes what the suite runs in",
    "export": "the shell's own",
    ".": "the shell's own",
    "[": "the shell's own",
    "cp": "the system's own",
    "sed": "the system's own",
}
"""Programs whose commands are not run by `test_documented_commands.py`, and what they need or who runs them."""
_WORDS = re.compile(r"(?:\w+=\$\()?(?:\w+=(?!\$\()\S* )*(\S+)")


class Command(NamedTuple):
    """One command of a page, as it stands there, in one line and without its comment."""

    page: str
    text: str
    inline: bool
    """Whether it stands in a sentence, where `decentral train` may be the name of a command, not one to type."""

    @property
    def program(self) -> str:
        """What is started: the first word but for assignments."""
        found = _WORDS.match(self.text)
        return found[1] if found else ""


def commands(page: str, text: str) -> list[Command]:
    """Return the commands in a page's Markdown: all lines of blocks that have one, and inline code that is one."""
    blocks, prose = _parted(text)
    found = []
    for block in blocks:
        told = [Command(page, bare, False) for line in block.replace("\\\n", "").splitlines() if (bare := _bare(line))]
        if any(command.program in (*OURS, *FOREIGN) or " --" in command.text for command in told):
            found += told
    spans = re.findall(r"`([^`]+)`", prose)
    inline = [Command(page, _bare(" ".join(span.split())), True) for span in spans]
    return found + [command for command in inline if command.program in OURS and " " in command.text]


def _parted(text: str) -> tuple[list[str], str]:
    """Return a page's blocks of code, indented or fenced, and the rest."""
    blocks: list[str] = []
    prose, block, fenced, before = "", "", False, ""
    for line in (*text.splitlines(), ""):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (block or not before)):
            block += line.strip() + "\n"
        else:
            prose += line + "\n"
        if block and not fenced and not line.startswith("    "):
            blocks.append(block)
            block = ""
        before = line
    return blocks, prose


def all_commands() -> list[Command]:
    """Return the commands of all pages, the same one once."""
    found = [
        command for page in PAGES for command in commands(page.relative_to(ROOT).as_posix(), page.read_text("utf-8"))
    ]
    return list({command.text: command for command in reversed(found)}.values())[::-1]


def _bare(line: str) -> str:
    """Return a line without its comment, and without what stands in brackets for what may be left out."""
    return re.sub(r"\s+\[[A-Z-][^\]]*\]", "", re.sub(r"(^|\s+)#.*", "", line)).rstrip("& ")
