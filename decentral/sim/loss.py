"""What lost packets cost a message, as TCP pays for it.

With a share p of the packets lost:

- every bit is sent 1 / (1 - p) times on average, and all of them take up the lines;
- congestion avoidance halves its window at each loss, so that a flow alone gets no more than
  `(MSS / RTT) x sqrt(3 / 2) / sqrt(p)` (Mathis, Semke, Mahdavi and Ott, *The Macroscopic Behavior of the TCP Congestion
  Avoidance Algorithm*, CCR 27(3), 1997, for periodic losses with every packet acknowledged);
- if the last packet of a message is lost, nothing behind it tells the receiver, and the sender waits for its timer:
  `RTO = max(1 s, 3 RTT)`, doubled each time it is lost again (RFC 6298, sections 2.2, 2.4 and 5.5).

The first two are means, the third is drawn for each message. Losses inside of a short message, which cost a round trip
each, are left out.
"""

from __future__ import annotations

import math

MSS_BITS = 8 * 1460  # an Ethernet frame less the headers of IP and TCP
LEAST_TIMEOUT_S = 1.0


def times_sent(loss: float) -> float:
    """Return how often each bit is sent on average."""
    return 1.0 / (1.0 - loss)


def mathis_bps(loss: float, rtt_s: float) -> float:
    """Return what a flow gets at most, in bits per second; infinity without loss or distance."""
    return MSS_BITS / rtt_s * math.sqrt(1.5 / loss) if loss and rtt_s else math.inf


def timeouts_s(loss: float, rtt_s: float, chance: float) -> float:
    """Return how long a message waits for timers; `chance`, in (0, 1), is uniform: k losses in a row below loss^k."""
    losses = int(math.log(chance) / math.log(loss)) if loss else 0
    return max(LEAST_TIMEOUT_S, 3.0 * rtt_s) * (2.0**losses - 1.0)
