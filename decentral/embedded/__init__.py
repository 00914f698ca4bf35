"""`decentral.join`: any rule beside a training loop of the user's own, on machines that need no Ray.

The rule, its `Peer`, the transport and the coordinator are those of a run on Ray. They live on an event loop in a
thread of their own (`beside.py`). The user's thread and that one hand the replica to each other at a gate (`gate.py`):
the loop has it while `Peer.train` waits, the rule between two phases. What they hand over is a float32 copy of the
model (`copies.py`), which the loop's thread alone reads from the model and writes back to it.
"""

import os

# Data loaders fork processes while the thread beside the loop talks. gRPC would try to follow them there, and now and
# then one dies of it; none of them ever talks. Read when gRPC is first imported, which happens below this.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
