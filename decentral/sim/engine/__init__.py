"""Who computes the local work of simulated workers: this process, or several beside it."""

from decentral.sim.engine.memory import Arena
from decentral.sim.engine.pool import Pool
from decentral.sim.engine.pooled import PooledReplica
from decentral.sim.engine.replicas import computed, phantoms

__all__ = ["Arena", "Pool", "PooledReplica", "computed", "phantoms"]
