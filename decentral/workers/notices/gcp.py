"""Google Compute Engine: what the metadata server says of a spot or preemptible machine's end."""

from __future__ import annotations

from decentral.workers.notices.metadata import ANSWER_S, Absent, MetadataNotices, Unusable, ask, usable
from decentral.workers.notices.notice import Notice

GRACE_S = 30.0
"""Seconds from the notice (ACPI G2 soft off) to the end (ACPI G3 mechanical off) of a spot machine, unless it was
made with a longer notice, of which the server does not tell."""
PATH = "/computeMetadata/v1/instance/preempted"
LONG_POLL_S = 60
"""Seconds after which the server shall answer though nothing has changed."""


class GcpNotices(MetadataNotices):
    """A spot machine is being preempted, 30 seconds ahead.

    `GET /computeMetadata/v1/instance/preempted` with `Metadata-Flavor: Google` is `FALSE` or `TRUE`; responses have
    that header too, and an ETag. With `wait_for_change=true&last_etag=...&timeout_sec=...` the server answers when the
    value is not the one with that ETag any more, or after that time with the old one. 503 means: try again.
    https://cloud.google.com/compute/docs/instances/create-use-preemptible
    https://cloud.google.com/compute/docs/metadata/querying-metadata
    """

    name = "gcp"
    every_s = 1.0  # between two long polls; the ETag sees to it that nothing is missed

    _etag: str | None = None

    async def look(self) -> Notice | None:
        change = f"?wait_for_change=true&last_etag={self._etag}&timeout_sec={LONG_POLL_S}" if self._etag else ""
        reply = await ask(
            self._url + PATH + change,
            headers={"Metadata-Flavor": "Google"},
            answer_s=ANSWER_S + (LONG_POLL_S if change else 0),
        )
        if reply.headers.get("Metadata-Flavor") != "Google":
            raise Absent("the service is not Google's")
        value = usable(reply).body.strip()
        if value not in ("TRUE", "FALSE"):
            raise Unusable(f"neither TRUE nor FALSE: {value[:40]!r}")
        self._etag = reply.headers.get("ETag")
        return Notice(self.name, GRACE_S, "Google Cloud preempts this machine") if value == "TRUE" else None
