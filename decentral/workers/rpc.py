"""What both gRPC services of a run share: the keys that every call needs, and the ways to serve and to dial."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from decentral.errors import ConfigError, RunError
from decentral.workers import certs
from decentral.workers.tuned import grpc

SECRET_KEY = "decentral-secret"
"""Metadata key under which every call carries the run secret."""
SECRET_VARIABLE = "DECENTRAL_SECRET"
"""Environment variable with the run's secret, where somebody is asked for it."""
SECRET_LENGTH = 16

SERVER_OPTIONS = (("grpc.so_reuseport", 0),)  # otherwise two runs could share a port, and each other's calls
CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),  # calls fail at once meanwhile, and a coordinator is soon back
    ("grpc.max_reconnect_backoff_ms", 500),
)


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Keys:
    """What makes a caller a member: the run's secret, and its certificates if the run has any (mutual TLS)."""

    secret: str = field(repr=False)
    certificates: certs.Certificates | None = None

    @classmethod
    def here(cls, secret: str, folder: Path | None) -> Keys:
        """Return the keys with the certificates that this machine has in `folder`, if any; raises `ConfigError`."""
        return cls(secret, None if folder is None else certs.read(folder))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries to pass the guard."""
        return ((SECRET_KEY, self.secret),)


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses, before a byte of the request is read, every call that does not carry the run secret; says how many."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()
        self._refused = 0
        self._refusal = grpc.stream_unary_rpc_method_handler(self._refuse)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        for key, value in details.invocation_metadata:
            if key == SECRET_KEY and hmac.compare_digest(str(value).encode(), self._secret):
                return await continuation(details)
        return self._refusal

    async def _refuse(self, _requests: Any, context: Any) -> NoReturn:
        self._refused += 1
        if str(self._refused).strip("0") == "1":  # 1, 10, 100, ...: whoever knocks for ever fills no log
            log.warning("%d calls without the run's secret, the last from %s", self._refused, context.peer())
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call does not carry the run's secret")
        raise AssertionError("abort returned")


async def serve(
    service: str, methods: Mapping[str, Any], *, host: str, port: int, keys: Keys, max_message_bytes: int
) -> tuple[Any, str]:
    """Serve the methods on `host:port` (0: a free port) to who has the keys; return the started server and its address.

    Raises `RunError` when the port cannot be had.
    """
    options = (*SERVER_OPTIONS, ("grpc.max_receive_message_length", max_message_bytes))
    server = grpc.aio.server(interceptors=[Guard(keys.secret)], options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, dict(methods)),))
    where = address_of(host, port)
    try:
        if keys.certificates is None:
            bound = server.add_insecure_port(where)
        else:
            bound = server.add_secure_port(where, _server_side(keys.certificates))
    except RuntimeError:
        bound = 0
    if not bound:
        raise RunError(
            f"cannot listen on port {port} of {host}: it is in use or not allowed; "
            "set real.port to another one, or to 0 for any free port"
        )
    await server.start()
    return server, address_of(host, bound)


def dial(address: str, keys: Keys) -> Any:
    """Return a channel to the address. It connects when first used, and with certificates to members alone."""
    if keys.certificates is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    named = (("grpc.ssl_target_name_override", certs.NAME),)  # what is proved is membership, not an address
    return grpc.aio.secure_channel(address, _client_side(keys.certificates), options=CHANNEL_OPTIONS + named)


def _server_side(held: certs.Certificates) -> Any:
    pair = ((held.key, held.certificate),)
    return grpc.ssl_server_credentials(pair, root_certificates=held.authority, require_client_auth=True)


def _client_side(held: certs.Certificates) -> Any:
    return grpc.ssl_channel_credentials(held.authority, held.key, held.certificate)


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def checked_secret(secret: str, instead: str) -> str:
    """Return the user's own secret; raises `ConfigError`, which says what to do `instead` and does not quote it."""
    if len(secret) < SECRET_LENGTH or not all("!" <= letter <= "~" for letter in secret):
        raise ConfigError(
            f"{SECRET_VARIABLE}: the run's secret must be at least {SECRET_LENGTH} printable ASCII characters without "
            f"spaces, such as `openssl rand -hex 32` makes; {instead}"
        )
    return secret
