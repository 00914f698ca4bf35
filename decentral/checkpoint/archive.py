"""Checkpoints in storage: written so that a torn one is never taken for whole, found again, and removed in time.

    URL/owner.json                               whose checkpoints these are: one run writes here at a time
    URL/00000012-5f1e.../worker-3.safetensors    what worker 3 wrote: chunks, each under its digest
    URL/00000012-5f1e.../manifest.json           written last: what the chunks are, and who they belong to

Checkpoints are ordered by the number in front, never by a clock. The name's second half is the owner's: a run that has
lost its place to another one cannot overwrite a file of that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from decentral.checkpoint.contents import digest_of, file_of, pieces_of, snapshot_of
from decentral.checkpoint.manifest import Description, File, Manifest, Piece
from decentral.checkpoint.storage import Storage, StorageError
from decentral.errors import ConfigError, RunError
from decentral.snapshot import Snapshot

OWNER = "owner.json"
MANIFEST = "manifest.json"
FOLDER = re.compile(r"(\d{8,})-[0-9a-f]+")


class Torn(Exception):
    """A checkpoint that is not what its manifest says, or has none that can be read; the message says how."""


@dataclass(frozen=True, slots=True)
class Found:
    """The checkpoint to go on from, and which newer ones were passed over and why."""

    folder: str
    manifest: Manifest
    passed_over: Mapping[str, str]


class Archive:
    """One run's checkpoints below a storage's URL, of which the newest `keep` stay. `owner`: a random hex word."""

    def __init__(self, storage: Storage, owner: str, keep: int) -> None:
        self._storage, self.owner, self._keep = storage, owner, keep

    def claim(self, *, resume: bool) -> None:
        """Make the place ours. Raises `ConfigError` if another run's checkpoints are here, unless we `resume` it.

        A run that is resumed elsewhere while it still lives loses the place: its next `commit` raises `RunError`.
        """
        names = self._storage.sizes()
        if not resume and any(name == OWNER or FOLDER.match(name) for name in names):
            raise ConfigError(
                f"checkpoint.url: {self._storage.url} holds another run's checkpoints; name another place, or go on "
                "from them with --resume"
            )
        self._storage.put(OWNER, json.dumps({"owner": self.owner}).encode())
        self._require_owner()

    def next_folder(self) -> str:
        """Return the name of a checkpoint that is newer than all here, torn ones included."""
        return f"{max(_folders(self._storage), default=(0, ''))[0] + 1:08d}-{self.owner}"

    def commit(self, folder: str, manifest: Manifest) -> None:
        """Make a checkpoint of a folder's files, then remove what is older than the newest `keep`.

        Raises `RunError` if the place has been taken over by another run, and `StorageError`, also if a file is not
        here: a worker then wrote to another place that has the same name, on its own machine; there is no checkpoint.
        """
        self._require_owner()
        here = self._storage.sizes(folder)
        for file in manifest.files:
            if here.get(f"{folder}/{file.name}") != file.nbytes:
                raise StorageError(
                    f"{self._storage.url}: {folder}/{file.name} is not here, though its worker has written it; all "
                    "machines must reach the same place by this URL"
                )
        self._storage.put(f"{folder}/{MANIFEST}", manifest.model_dump_json().encode())
        self._prune()

    def _prune(self) -> None:
        """Remove old checkpoints, and what is left of those that never came to be; the manifest goes first."""
        folders = _folders(self._storage)
        whole = sorted(number for (number, _), names in folders.items() if MANIFEST in names)
        kept = set(whole[-self._keep :])
        for (number, folder), names in folders.items():
            if number < whole[-1] and number not in kept:
                ordered = sorted(names, key=lambda name: name != MANIFEST)
                self._storage.remove([f"{folder}/{name}" for name in ordered], folder)

    def _require_owner(self) -> None:
        try:
            owner = json.loads(self._storage.read(OWNER))["owner"]
        except (ValueError, KeyError, TypeError):
            owner = "nobody"
        if owner != self.owner:
            raise RunError(f"{self._storage.url}: another run writes its checkpoints here now")


def write_share(
    storage: Storage, folder: str, snapshot: Snapshot, description: Description, share: Sequence[str]
) -> File:
    """Write the worker's share of a checkpoint and return what the manifest says of it. Raises `StorageError`."""
    chunks = pieces_of(snapshot, description, share)
    file, header = file_of(f"worker-{description.worker}.safetensors", share, chunks)
    storage.write(f"{folder}/{file.name}", [header, *chunks])
    return file


def newest(storage: Storage) -> Found | None:
    """Return the newest checkpoint of which every byte is there and right; None if there is none.

    Reads all of it. Raises `StorageError` when storage does not answer: that says nothing about the checkpoints.
    """
    passed_over: dict[str, str] = {}
    for (_, folder), names in sorted(_folders(storage).items(), reverse=True):
        try:
            manifest = _manifest(storage, folder, names)
            for file in manifest.files:
                if names.get(file.name) != file.nbytes:
                    raise Torn(f"{file.name} has {names.get(file.name, 'no')} bytes instead of {file.nbytes}")
            for file in manifest.files:
                for _piece in _pieces(storage, folder, file, file.pieces):
                    pass
        except Torn as error:
            passed_over[folder] = str(error)
        else:
            return Found(folder, manifest, passed_over)
    return None


def reopen(storage: Storage, folder: str) -> Found:
    """Return the checkpoint that `newest` has found elsewhere, without reading it once more: `load` checks every byte.

    Raises `RunError` if it is not there any more.
    """
    names = {path.split("/")[-1]: size for path, size in storage.sizes(folder).items()}
    try:
        return Found(folder, _manifest(storage, folder, names), {})
    except Torn as error:
        raise RunError(f"{storage.url}/{folder}: {error}") from None


def load(storage: Storage, found: Found, worker: int, column: Collection[int] = ()) -> Snapshot:
    """Return the worker's state, checked byte for byte.

    A worker that was not there gets what a newcomer would, from one of those that were: all but what is that one's own.
    Of `column` alone, if given: those who hold the same stage of the model. Raises `RunError` if none of them was
    there, or a byte has changed since the checkpoint was found.
    """
    described = found.manifest.workers
    members = sorted(described.keys() & column if column else described)
    if not members:
        raise RunError(f"{storage.url}/{found.folder}: nobody in it has worker {worker}'s stage of the model")
    source = described.get(worker) or described[members[worker % len(members)]]
    chunks = read_chunks(storage, found, {digest for held in source.tensors for digest in held.chunks})
    snapshot = snapshot_of(source, chunks)
    return snapshot if worker in described else snapshot.for_another()


def read_chunks(storage: Storage, found: Found, wanted: Collection[str]) -> dict[str, bytes]:
    """Return the bytes of these chunks by their digests, each read once.

    Raises `RunError` if a byte has changed since the checkpoint was found.
    """
    chunks: dict[str, bytes] = {}
    try:
        for file in found.manifest.files:
            pieces = [piece for piece in file.pieces if piece.digest in wanted]
            if pieces:
                chunks.update(_pieces(storage, found.folder, file, pieces))
    except Torn as error:
        raise RunError(f"{storage.url}/{found.folder}: {error}; it was whole when the run began") from None
    return chunks


def _folders(storage: Storage) -> dict[tuple[int, str], dict[str, int]]:
    """Return the sizes of the files in each checkpoint's folder, by (number, folder)."""
    folders: dict[tuple[int, str], dict[str, int]] = {}
    for path, size in storage.sizes().items():
        folder, _, name = path.partition("/")
        match = FOLDER.fullmatch(folder)
        if match and name:
            folders.setdefault((int(match[1]), folder), {})[name] = size
    return folders


def _manifest(storage: Storage, folder: str, names: Mapping[str, int]) -> Manifest:
    if MANIFEST not in names:
        raise Torn("it has no manifest: it was never finished")
    try:
        return Manifest.model_validate_json(storage.read(f"{folder}/{MANIFEST}"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"])
        raise Torn(f"its manifest cannot be read: {place}: {first['msg']}") from None


def _pieces(storage: Storage, folder: str, file: File, pieces: Sequence[Piece]) -> Iterator[tuple[str, bytes]]:
    """Yield the digest and the bytes of some pieces of a file. Raises `Torn` for the first that is not what it was."""
    name = f"{folder}/{file.name}"
    header_bytes = file.pieces[0].start if file.pieces else file.nbytes
    if digest_of(storage.read(name, 0, header_bytes)) != file.header:
        raise Torn(f"the header of {file.name} is not what was written")
    for piece in pieces:
        data = storage.read(name, piece.start, piece.start + piece.nbytes)
        if digest_of(data) != piece.digest:
            raise Torn(f"{file.name} is not what was written, at byte {piece.start} or in the {piece.nbytes} after it")
        yield piece.digest, data
