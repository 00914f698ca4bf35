"""The page on codecs: what they do, and what they cost and lose, measured when the page is made."""

from __future__ import annotations

from typing import NamedTuple

import torch

from decentral.protocols.codecs import CODECS, Codec, Wrapper
from website.parts import described_part
from website.tables import code, table

ROWS, COLUMNS = 1000, 1000
SEED = 0
INTRO = f"""# Every codec

How vectors travel: `codec = "int8"`, or with fields, `codec = {{name = "topk", k = 32}}`. Measured when this page was
made, with the defaults, on a {ROWS:,} x {COLUMNS:,} matrix of standard normal numbers (seed {SEED}): in float32
they are 4,000,000 bytes. The error is that of one packet, |C(x) - x| / |x|; what error feedback makes of it over many
rounds is another matter. Those that wrap another codec send its packets. Speeds: [wire](wire.md).
"""
LOSSES = {
    "none": "nothing",
    "rounding": "rounding: every element arrives, a little off",
    "contractive": "much of it is missing: wants error feedback",
    "unbiased": "right on average, with a large variance",
}


class Measured(NamedTuple):
    """What a codec makes of a million normal numbers: bytes on the wire, and the relative error of what arrives."""

    nbytes: int
    error: float


def measured(codec: Codec) -> Measured:
    """Encode and decode a matrix of standard normal float32, the same one every time, and return what came of it.

    The error is |C(x) - x| / |x| in the Euclidean norm, of one packet without any memory of earlier ones.
    """
    values = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(SEED))
    fitted = codec.fit([(ROWS, COLUMNS)])
    packet = fitted.encode(values)
    return Measured(packet.nbytes, float((fitted.decode(packet, values) - values).norm() / values.norm()))


def codecs_page() -> str:
    """Return the page on every built-in codec."""
    codecs = sorted(CODECS.items())
    packing = [(name, cls()) for name, cls in codecs if not issubclass(cls, Wrapper)]
    head = ("name", "bits an element", "bytes of a million", "less than float32", "relative error", "what is lost")
    rows = ((f"[{code(name)}](#{name})", *_figures(measured(codec)), LOSSES[codec.loss]) for name, codec in packing)
    return "\n".join([INTRO, table(head, rows), *(described_part(name, cls, 2) for name, cls in codecs)])


def _figures(found: Measured) -> list[str]:
    elements = ROWS * COLUMNS
    return [
        f"{8 * found.nbytes / elements:.3g}",
        f"{found.nbytes:,}",
        f"{4 * elements / found.nbytes:.3g} x",
        "0" if found.error == 0 else f"{found.error:.3g}",
    ]
