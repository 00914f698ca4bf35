"""When fragments are due that travel one after the other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Staggered:
    """The steps at which `count` fragments are due, each once in a cycle and one after the other.

    Fragment p is due at H + p s, 2 H + p s, ..., with s = max(1, floor(H / count)): after its first H steps, then every
    H. If there are more fragments than steps in `period`, the cycle has as many steps as there are fragments.
    """

    count: int
    period: int

    @property
    def cycle(self) -> int:
        """H: steps between two rounds of a fragment."""
        return max(self.period, self.count)

    def first(self, index: int) -> int:
        """Return the step at which a fragment is due for the first time."""
        return self.cycle + index * max(1, self.period // self.count)

    def due(self, step: int) -> list[int]:
        """Return the fragments that are due at a step, ascending."""
        return [index for index in range(self.count) if step > 0 and self._left(index, step - 1) == 1]

    def steps(self, step: int) -> int:
        """Return the local steps from `step` until the next at which a fragment is due, at least 1."""
        return min(self._left(index, step) for index in range(self.count))

    def _left(self, index: int, step: int) -> int:
        past = step - self.first(index)
        return -past if past < 0 else self.cycle - past % self.cycle
