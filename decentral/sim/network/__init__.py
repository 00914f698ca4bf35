"""A fluid network whose flows share bandwidth max-min fairly."""

from decentral.sim.network.flow import Flow, FlowState, Terms
from decentral.sim.network.fluid import Network
from decentral.sim.network.sharing import max_min

__all__ = ["Flow", "FlowState", "Network", "Terms", "max_min"]
