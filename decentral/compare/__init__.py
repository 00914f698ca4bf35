"""Many rules on the same work, over seeds and workloads, scored."""

from decentral.compare.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
