"""Certificates of a run: a small authority that issues them, and the check of those that a machine holds.

A certificate says "a member", not which machine: all carry the same name, so addresses may change as they like. The
authority's key is thrown away when its certificates are issued; nobody can make another one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from decentral.errors import ConfigError

T = TypeVar("T")

NAME = "decentral"
"""The name, common and alternative, in every certificate of a worker."""
CA, CERTIFICATE, KEY = "ca.pem", "worker.pem", "worker.key"
CLOCKS_APART = timedelta(hours=1)
"""A certificate is good from so long ago: the machines' clocks differ."""


@dataclass(frozen=True, slots=True)
class Certificates:
    """What a worker shows and what it asks of others, as PEM: the authority, its own certificate and its key."""

    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)


def read(folder: Path) -> Certificates:
    """Return the certificates in `folder` of this machine: `ca.pem`, `worker.pem` and `worker.key`.

    Raises `ConfigError` when one is missing, unreadable, not valid at this time, or does not belong to the others.
    """
    folder = folder.expanduser()
    authority, certificate, key = (_bytes(folder / name) for name in (CA, CERTIFICATE, KEY))
    ca = _parsed(folder / CA, x509.load_pem_x509_certificate, authority)
    mine = _parsed(folder / CERTIFICATE, x509.load_pem_x509_certificate, certificate)
    private = _parsed(folder / KEY, lambda data: serialization.load_pem_private_key(data, None), key)
    _require_current(folder / CA, ca)
    _require_current(folder / CERTIFICATE, mine)
    try:
        mine.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise _wrong(folder / CERTIFICATE, f"it was not issued by the authority in {CA}") from None
    if private.public_key() != mine.public_key():
        raise _wrong(folder / KEY, f"it is not the key of {CERTIFICATE}")
    if NAME not in _names(mine):
        raise _wrong(folder / CERTIFICATE, f"it must have the alternative name '{NAME}'")
    return Certificates(authority, certificate, key)


def issue(folder: Path, *, workers: int | None, days: int, force: bool) -> list[Path]:
    """Make an authority and certificates that hold for `days`; return the folders, each complete for one machine.

    `workers` None: one certificate in `folder` itself, which all machines share; otherwise `worker-0`, `worker-1`, ...
    below it, with one each. Raises `ConfigError`, without `force` also when there is a file in the way.
    """
    folders = [folder] if workers is None else [folder / f"worker-{worker}" for worker in range(workers)]
    taken = [path for each in folders for path in (each / CA, each / CERTIFICATE, each / KEY) if path.exists()]
    if taken and not force:
        raise ConfigError(f"{taken[0]}: there is a file already; choose another folder, or --force to lose it for good")
    now = datetime.now(timezone.utc)
    authority = Authority(now - CLOCKS_APART, now + timedelta(days=days))
    for each in folders:
        authority.certify(each)
    return folders


class Authority:
    """Issues certificates that hold, if nothing else is said, from `begin` to `end` (UTC). Its key is never written."""

    def __init__(self, begin: datetime, end: datetime) -> None:
        self._begin, self._end = begin, end
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _subject(f"{NAME} authority")
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._certificate = self._signed(self._name, self._key.public_key(), end, constraints)

    def certify(self, folder: Path, end: datetime | None = None) -> None:
        """Make a key and its certificate and write what a machine needs into `folder`; raises `ConfigError`."""
        key = ec.generate_private_key(ec.SECP256R1())
        constraints = x509.BasicConstraints(ca=False, path_length=None)
        certificate = self._signed(_subject(NAME), key.public_key(), end or self._end, constraints)
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        _write(folder / CA, self._certificate.public_bytes(pem))
        _write(folder / CERTIFICATE, certificate.public_bytes(pem))
        _write(folder / KEY, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))

    def _signed(
        self, subject: x509.Name, public: ec.EllipticCurvePublicKey, end: datetime, constraints: x509.BasicConstraints
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder(subject_name=subject, issuer_name=self._name, public_key=public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._begin)
            .not_valid_after(end)
            .add_extension(constraints, critical=True)
            .add_extension(_usage(authority=constraints.ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if not constraints.ca:
            uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
            builder = builder.add_extension(uses, critical=False)
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, data: bytes) -> None:
    """Write a new file that its owner alone may read; what was there before is gone, with the rights it had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror or error}") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror or error}") from None


def _parsed(path: Path, load: Callable[[bytes], T], data: bytes) -> T:
    try:
        return load(data)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # the library's words may quote what the file holds
        raise _wrong(path, "it is damaged, encrypted, or not PEM") from None


def _require_current(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.now(timezone.utc)
    if now > certificate.not_valid_after_utc:
        raise _wrong(path, f"it expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if now < certificate.not_valid_before_utc:
        raise _wrong(path, f"it is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return []
    return names.get_values_for_type(x509.DNSName)


def _wrong(path: Path, what: str) -> ConfigError:
    return ConfigError(
        f"real.certificates: {path} on {socket.gethostname()}: {what}; `decentral certs` makes a folder of files that "
        "fit, to be copied to every machine"
    )
