"""The errors a user may meet, and the one a rule may meet.

Every message says what was wrong, where, and what is allowed instead. The command line prints it and nothing else.
"""

from __future__ import annotations


class DecentralError(Exception):
    """Base of the errors that are the user's to mend; the command line exits with `status`."""

    status = 2


class ConfigError(DecentralError):
    """A run file, an option or a combination of parts that cannot work."""


class TaskError(DecentralError):
    """A task could not be loaded, raised, or gave a loss that is not finite."""


class Diverged(TaskError):
    """The loss of a local step is not finite."""


class RunError(DecentralError):
    """A run that began could not go on: nobody left, the cluster unreachable, a port in use."""

    status = 1


class VerificationError(DecentralError):
    """A run whose own records contradict each other. The runtime is to blame, not the user."""

    status = 1


class PeerGone(ConnectionError):
    """The worker at the other end has left the run or died. A rule's collective ends its wait with this."""
