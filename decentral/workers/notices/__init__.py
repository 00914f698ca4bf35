"""Being told to go before the machine goes: SIGTERM, Ray, and the clouds' metadata services, heard as one.

sources = sources_named(("sigterm", "ray", "aws"))
notice = await first_notice(sources)            # or, beside the work: listen(sources, heed)
...                                             # leave the run within notice.deadline_s seconds
for source in sources:
    await source.ready()                        # as the last one on the machine
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping

from decentral.errors import ConfigError
from decentral.naming import nearest
from decentral.workers.notices.aws import AwsNotices, AwsRebalanceNotices
from decentral.workers.notices.azure import AzureNotices
from decentral.workers.notices.gcp import GcpNotices
from decentral.workers.notices.metadata import METADATA_URL
from decentral.workers.notices.notice import Notice, NoticeSource, first_notice, listen
from decentral.workers.notices.sigterm import SigtermNotices

__all__ = ["SOURCES", "Notice", "NoticeSource", "first_notice", "listen", "sources_named"]


def _ray_drain(_url: str) -> NoticeSource:
    module = importlib.import_module("decentral.workers.notices.ray_drain")  # Ray need not be on the machine
    source: NoticeSource = module.RayDrainNotices()
    return source


SOURCES: Mapping[str, Callable[[str], NoticeSource]] = {
    "sigterm": lambda _url: SigtermNotices(),
    "ray": _ray_drain,
    "aws": AwsNotices,
    "aws-rebalance": AwsRebalanceNotices,
    "gcp": GcpNotices,
    "azure": AzureNotices,
}
"""Sources by their names in a run file; each is made from the address of the metadata service."""


def sources_named(names: Iterable[str], metadata_url: str = METADATA_URL) -> list[NoticeSource]:
    """Return the sources of these names. Raises `ConfigError` for a name that there is not."""
    sources = []
    for name in names:
        if name not in SOURCES:
            hint = nearest(name, SOURCES)
            raise ConfigError(f"unknown source of notices '{name}'; {hint}known are {', '.join(SOURCES)}")
        sources.append(SOURCES[name](metadata_url))
    return sources
