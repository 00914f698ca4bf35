"""Certificates: what is issued fits, what does not fit is named, and no key is lost or shown."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.verification import PolicyBuilder, Store
from typer.testing import CliRunner

from decentral.cli import app
from decentral.config import read_run, validated
from decentral.errors import ConfigError
from decentral.workers.certs import CA, CERTIFICATE, KEY, NAME, Authority, issue, read

FILES = (CA, CERTIFICATE, KEY)
NOW = datetime.now(timezone.utc)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `decentral certs` leaves it."""
    return issue(tmp_path / "certs", workers=None, days=30, force=False)[0]


def contents(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


# What is issued.


def test_what_is_issued_is_read_and_is_for_its_owner_alone(folder: Path) -> None:
    held = read(folder)
    assert [held.authority, held.certificate, held.key] == contents(folder)
    assert [stat.S_IMODE((folder / name).stat().st_mode) for name in FILES] == [0o600] * 3
    assert sorted(os.listdir(folder)) == sorted(FILES)  # the authority's key is nowhere


def test_an_independent_verifier_takes_it_for_a_server_and_for_a_client(folder: Path) -> None:
    authority, certificate = (x509.load_pem_x509_certificate(data) for data in contents(folder)[:2])
    policy = PolicyBuilder().store(Store([authority]))
    assert policy.build_server_verifier(x509.DNSName(NAME)).verify(certificate, []) == [certificate, authority]
    assert policy.build_client_verifier().verify(certificate, []).chain == [certificate, authority]
    assert certificate.not_valid_after_utc - NOW > timedelta(days=29)


def test_each_worker_has_a_key_of_its_own_under_one_authority(tmp_path: Path) -> None:
    folders = issue(tmp_path, workers=3, days=1, force=False)
    assert [folder.name for folder in folders] == ["worker-0", "worker-1", "worker-2"]
    held = [read(folder) for folder in folders]
    assert len({each.authority for each in held}) == 1
    assert len({each.key for each in held}) == 3


def test_a_key_is_not_overwritten_unless_forced(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(ConfigError, match=rf"{folder / CA}: there is a file already.*--force"):
        issue(folder, workers=None, days=30, force=False)
    for name in (CA, CERTIFICATE):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=KEY):
        issue(folder, workers=None, days=30, force=False)
    assert os.listdir(folder) == [KEY]
    (folder / KEY).chmod(0o644)
    issue(folder, workers=None, days=30, force=True)
    assert all(new != old for new, old in zip(contents(folder), before, strict=True))
    assert stat.S_IMODE((folder / KEY).stat().st_mode) == 0o600
    read(folder)


def test_a_folder_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file' / 'in'}.*cannot be written"):
        issue(tmp_path / "file" / "in", workers=None, days=1, force=False)


def test_the_key_is_not_shown(folder: Path) -> None:
    assert str(read(folder).key)[40:60] not in repr(read(folder))


def test_the_command_says_what_to_do_with_them(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["certs", str(tmp_path / "shared"), "--days", "7"]).output
    assert "7 days" in shown
    assert f'certificates = "{tmp_path / "shared"}"' in shown
    (tmp_path / "run.toml").write_text(f'[real]\ncertificates = "{tmp_path / "shared"}"\n')
    folder = read_run(tmp_path / "run.toml").real.certificates
    assert folder is not None
    read(folder)
    shown = CliRunner().invoke(app, ["certs", str(tmp_path / "each"), "--workers", "2"]).output
    assert "worker-1" in shown
    read(tmp_path / "each" / "worker-1")


def test_the_run_file_keeps_the_folder() -> None:
    run = validated({"real": {"certificates": "~/certs"}}, "test")
    assert run.to_table()["real"]["certificates"] == "~/certs"
    assert "certificates" not in validated({}, "test").to_table()["real"]


def test_the_folder_may_be_in_the_home_of_each_machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert read(Path("~/certs")) == read(folder)


# What does not fit.


def missing(folder: Path) -> None:
    (folder / KEY).unlink()


def unreadable(folder: Path) -> None:
    (folder / CERTIFICATE).unlink()
    (folder / CERTIFICATE).mkdir()


def damaged_certificate(folder: Path) -> None:
    (folder / CERTIFICATE).write_bytes((folder / CERTIFICATE).read_bytes()[:200])


def empty_authority(folder: Path) -> None:
    (folder / CA).write_bytes(b"")


def damaged_key(folder: Path) -> None:
    (folder / KEY).write_bytes((folder / KEY).read_bytes().replace(b"PRIVATE", b"PUBLIC"))


def encrypted_key(folder: Path) -> None:
    key = serialization.load_pem_private_key((folder / KEY).read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"word")
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / KEY).write_bytes(key.private_bytes(pem, form, locked))


def expired(folder: Path) -> None:
    Authority(NOW - timedelta(hours=3), NOW + timedelta(days=1)).certify(folder, end=NOW - timedelta(hours=1))


def expired_authority(folder: Path) -> None:
    Authority(NOW - timedelta(hours=3), NOW - timedelta(hours=1)).certify(folder, end=NOW + timedelta(days=1))


def not_yet_valid(folder: Path) -> None:
    Authority(NOW + timedelta(hours=1), NOW + timedelta(days=1)).certify(folder)


def of_another_authority(folder: Path) -> None:
    (other,) = issue(folder.parent / "other", workers=None, days=1, force=False)
    shutil.copy(other / CA, folder / CA)


def of_another_key(folder: Path) -> None:
    (other,) = issue(folder.parent / "other", workers=None, days=1, force=False)
    shutil.copy(other / KEY, folder / KEY)


def of_another_kind_of_key(folder: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / KEY).write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))


def without_the_name(folder: Path) -> None:
    """A pair that signs itself, as a tutorial would have it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, NOW - timedelta(1), NOW + timedelta(1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / KEY).write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
    for file in (CA, CERTIFICATE):
        (folder / file).write_bytes(certificate)


@pytest.mark.parametrize(
    ("spoil", "file", "reason"),
    [
        (missing, KEY, "No such file"),
        (unreadable, CERTIFICATE, "cannot be read: Is a directory"),
        (damaged_certificate, CERTIFICATE, "damaged"),
        (empty_authority, CA, "damaged"),
        (damaged_key, KEY, "damaged"),
        (encrypted_key, KEY, "encrypted"),
        (expired, CERTIFICATE, "it expired on 20"),
        (expired_authority, CA, "it expired on 20"),
        (not_yet_valid, CA, "not valid before 20"),
        (of_another_authority, CERTIFICATE, f"not issued by the authority in {CA}"),
        (of_another_key, KEY, f"not the key of {CERTIFICATE}"),
        (of_another_kind_of_key, KEY, f"not the key of {CERTIFICATE}"),
        (without_the_name, CERTIFICATE, f"alternative name '{NAME}'"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, spoil: Callable[[Path], None], file: str, reason: str) -> None:
    spoil(folder)
    with pytest.raises(ConfigError, match=reason) as caught:
        read(folder)
    message = str(caught.value)
    assert message.startswith(f"real.certificates: {folder / file} on ")
    assert "decentral certs" in message
