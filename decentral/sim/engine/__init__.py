"""Who computes the local work of simulated workers: this process, or several beside it."""

from decentral.sim.engine.memory import Arena
from decentral.sim.engine.pool import Pool, answer_of, can_fork, cores
from decentral.sim.engine.pooled import PooledReplica
from decentral.sim.engine.replicas import computed, phantoms

__all__ = ["Arena", "Pool", "PooledReplica", "answer_of", "can_fork", "computed", "cores", "phantoms"]
