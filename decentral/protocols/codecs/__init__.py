"""How vectors travel."""

from __future__ import annotations

from decentral.protocols.codecs.blockwise import Int4, Int8
from decentral.protocols.codecs.codec import CODECS, Codec, Wrapper
from decentral.protocols.codecs.coder import Coder, Reduce
from decentral.protocols.codecs.dct import DCT
from decentral.protocols.codecs.dense import BFloat16, Float16, Float32
from decentral.protocols.codecs.dynamic import Dynamic8
from decentral.protocols.codecs.e3m0 import E3M0
from decentral.protocols.codecs.ef21 import EF21
from decentral.protocols.codecs.feedback import ErrorFeedback
from decentral.protocols.codecs.powersgd import PowerSGD
from decentral.protocols.codecs.scalars import OneByte
from decentral.protocols.codecs.sign_magnitude import SignMagnitude
from decentral.protocols.codecs.sketch import Sketch
from decentral.protocols.codecs.topk import TopK

CODECS.update({codec.name: codec for codec in (Float32, BFloat16, Float16, Int8, Int4, Dynamic8, E3M0, ErrorFeedback)})
CODECS.update({codec.name: codec for codec in (SignMagnitude, TopK, DCT, Sketch, PowerSGD, EF21, OneByte)})

__all__ = [
    "CODECS",
    "DCT",
    "E3M0",
    "EF21",
    "BFloat16",
    "Codec",
    "Coder",
    "Dynamic8",
    "ErrorFeedback",
    "Float16",
    "Float32",
    "Int4",
    "Int8",
    "OneByte",
    "PowerSGD",
    "Reduce",
    "SignMagnitude",
    "Sketch",
    "TopK",
    "Wrapper",
]
