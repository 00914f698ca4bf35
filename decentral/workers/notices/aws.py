"""Amazon EC2: what the instance metadata service says of a spot instance's end."""

from __future__ import annotations

import math

from pydantic import AwareDatetime, BaseModel

from decentral.workers.notices.metadata import MetadataNotices, Reply, Unusable, ask, at_home, usable
from decentral.workers.notices.notice import Notice

TOKEN_SECONDS = "21600"
"""How long a session token shall be valid: six hours, the longest there is."""


class _Action(BaseModel):
    action: str
    time: AwareDatetime


class _Recommendation(BaseModel):
    noticeTime: AwareDatetime


class AwsNotices(MetadataNotices):
    """A spot instance will be stopped or terminated, two minutes ahead.

    IMDSv2: `PUT /latest/api/token` with `X-aws-ec2-metadata-token-ttl-seconds` gives a token; then `GET
    /latest/meta-data/spot/instance-action` with `X-aws-ec2-metadata-token` is 404 until there is something to say, then
    `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`; 401 when the token is no longer valid. Amazon recommends
    to ask every 5 seconds.
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/configuring-instance-metadata-service.html
    """

    name = "aws"
    every_s = 5.0
    path = "/latest/meta-data/spot/instance-action"

    _token: str | None = None

    async def look(self) -> Notice | None:
        if self._token is None:
            asked = {"X-aws-ec2-metadata-token-ttl-seconds": TOKEN_SECONDS}
            self._token = at_home(await ask(f"{self._url}/latest/api/token", method="PUT", headers=asked)).body.strip()
        reply = await ask(self._url + self.path, headers={"X-aws-ec2-metadata-token": self._token})
        if reply.status == 404:
            return None
        if reply.status in (400, 401):
            self._token = None
            raise Unusable("the token has expired, or never was one")
        return self.understood(usable(reply))

    def understood(self, reply: Reply) -> Notice:
        """Return the notice that the reply holds; raises `ValueError` if it holds none."""
        found = _Action.model_validate_json(reply.body)
        return Notice(self.name, reply.seconds_until(found.time), f"AWS will {found.action} this spot instance")


class AwsRebalanceNotices(AwsNotices):
    """A spot instance is likelier than others to be interrupted; when, and whether, nobody knows.

    `GET /latest/meta-data/events/recommendations/rebalance`, 404 or `{"noticeTime": "2020-10-27T08:22:00Z"}`: when the
    recommendation was made. It may come before the two minutes' notice or along with it.
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html
    """

    name = "aws-rebalance"
    path = "/latest/meta-data/events/recommendations/rebalance"

    def understood(self, reply: Reply) -> Notice:
        found = _Recommendation.model_validate_json(reply.body)
        return Notice(
            self.name, math.inf, f"AWS recommends to leave this instance, since {found.noticeTime:%H:%M:%S} UTC"
        )
