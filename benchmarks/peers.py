"""Environments of other projects, for benchmarks that measure them beside decentral; kept outside the repository.

    python -m benchmarks.peers hivemind

makes ~/.cache/decentral-peers/hivemind; without a name it says which there are. The variable DECENTRAL_PEERS names
another folder than ~/.cache/decentral-peers, and DECENTRAL_EXOGYM a checkout of EXO Gym to install instead of GitHub's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import venv
from pathlib import Path

FOLDER = Path(os.environ.get("DECENTRAL_PEERS", Path.home() / ".cache" / "decentral-peers"))
TORCH = ("torch==2.13.0+cpu", "--extra-index-url", "https://download.pytorch.org/whl/cpu", "--retries", "1")
EXOGYM = os.environ.get("DECENTRAL_EXOGYM", "git+https://github.com/exo-explore/gym@9fa323c")
PINNED = {
    "hivemind": (*TORCH, "hivemind==1.1.12", "bitsandbytes==0.50.2", "numpy==2.3.5"),
    "torchft": (*TORCH, "torchft==0.2.0", "numpy==2.3.5"),
    "exogym": (*TORCH, "torchvision==0.28.0", EXOGYM),
    "flower": (*TORCH, "flwr==1.41.0", "numpy==2.3.5"),
}
PATCHES = {"exogym": ("exogym/utils.py", '"lo0"', '"lo"')}
"""A file of an installed package, and what must be written instead of what in it to run on Linux."""


def python_of(peer: str) -> Path | None:
    """Return the Python of the peer's environment; None if it has not been made."""
    python = FOLDER / peer / "bin" / "python"
    return python if (FOLDER / peer / "ready").exists() else None


def make(peer: str) -> None:
    """Make the peer's environment, or complete one that was broken off."""
    folder = FOLDER / peer
    venv.create(folder, with_pip=True, symlinks=True)
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *PINNED[peer]], check=True)
    if peer in PATCHES:
        name, old, new = PATCHES[peer]
        (patched,) = folder.glob(f"lib/python*/site-packages/{name}")
        patched.write_text(patched.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    (folder / "ready").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="peer", help=f"whose environment to make: {', '.join(PINNED)}")
    for peer in parser.parse_args().peers:
        if peer not in PINNED:
            parser.error(f"unknown peer '{peer}'; choose one of {', '.join(PINNED)}")
        make(peer)
    for peer in PINNED:
        print(f"{peer}: {python_of(peer) or f'not there; python -m benchmarks.peers {peer} makes it'}")


if __name__ == "__main__":
    main()
