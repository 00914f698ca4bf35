"""What DiLoCo costs in loss, as published: scaling laws in the size of the model and the number of replicas.

Charles et al., *Communication-Efficient Language Model Training Scales Reliably and Robustly: Scaling Laws for DiLoCo*
(arXiv 2503.09799), fitted to language models of 35M to 2.4B parameters, each trained on 20 tokens a parameter, H = 30,
all replicas together as many tokens as data-parallel training has:

    L_M(N) = A_M N^alpha_M        for data parallelism and M = 1, 2, 4, 8
    L(N, M) = A N^alpha M^beta    for all M together
"""

from __future__ import annotations

DATA_PARALLEL = (18.129, -0.0953)
BY_REPLICAS = {1: (18.363, -0.0961), 2: (18.768, -0.0969), 4: (19.762, -0.0992), 8: (21.051, -0.1018)}
"""(A_M, alpha_M) by M."""
JOINT = (19.226, -0.0985, 0.0116)
"""(A, alpha, beta)."""
MOST_REPLICAS = 8
SIZES = (35e6, 10e9)
"""Parameters between which the laws are known to hold: fitted up to 2.4B, tried at 4B and 10B."""


def loss_above_data_parallel(parameters: float, replicas: int) -> float | None:
    """Return by what share DiLoCo's loss is above that of data parallelism; None where the laws do not reach."""
    if not (SIZES[0] <= parameters <= SIZES[1] and 1 <= replicas <= MOST_REPLICAS):
        return None
    scale, exponent = DATA_PARALLEL
    whole = scale * parameters**exponent
    if replicas in BY_REPLICAS:
        scale, exponent = BY_REPLICAS[replicas]
        return float(scale * parameters**exponent / whole - 1)
    scale, exponent, growth = JOINT
    return float(scale * parameters**exponent * replicas**growth / whole - 1)
