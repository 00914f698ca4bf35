"""What a microbatch costs: at each node, and on the way between two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from decentral.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that one microbatch takes at nodes `0 .. N - 1` and between them.

    The shape and both factors are those of SkipPipe's code. Raises `ConfigError` if a figure is not finite or below 0,
    or if there are not as many links as pairs of nodes.
    """

    forward: Sequence[float]
    """`[N]`, of a node's forward pass."""
    links: Sequence[Sequence[float]]
    """`[N, N]`, of handing activations from the row's node to the column's; their gradients take as long on the way
    back. What is on the diagonal does not count."""
    loss_share: float = 0.25
    """The loss at the origin, there and back, as a share of the origin's forward pass."""
    backward_factor: float = 1.5
    """A backward pass over a forward pass."""

    def __post_init__(self) -> None:
        nodes = len(self.forward)
        if [len(row) for row in self.links] != [nodes] * nodes:
            raise ConfigError(f"costs.links: {nodes} nodes need {nodes} rows of {nodes} seconds each")
        figures = {"forward": self.forward, "loss_share": [self.loss_share], "backward_factor": [self.backward_factor]}
        for name, values in (*figures.items(), *((f"links[{index}]", row) for index, row in enumerate(self.links))):
            wrong = [value for value in values if not (math.isfinite(value) and value >= 0)]
            if wrong:
                raise ConfigError(f"costs.{name}: {wrong[0]} is not allowed; take a finite number of at least 0")

    def link(self, source: int, to: int) -> float:
        """Return the seconds from one node to another, 0 to itself; back against the link it is the same."""
        return self.links[source][to] if source != to else 0.0

    def backward(self, node: int) -> float:
        """Return the seconds of a node's backward pass."""
        return self.backward_factor * self.forward[node]

    def loss(self, origin: int) -> float:
        """Return the seconds of the loss at a microbatch's origin."""
        return self.loss_share * self.forward[origin]

    def alone(self, path: Sequence[int]) -> float:
        """Return the seconds of a microbatch that meets no other, from the start at `path[0]` until it is back there.

            (1 + backward_factor) sum_i forward(v_i) + loss_share forward(v_0) + 2 sum_i link(v_i, v_i+1),

        where the node after the last is `v_0`.
        """
        passes = (1 + self.backward_factor) * sum(self.forward[node] for node in path)
        ways = sum(self.link(one, other) for one, other in zip(path, (*path[1:], path[0]), strict=True))
        return passes + self.loss(path[0]) + 2 * ways
