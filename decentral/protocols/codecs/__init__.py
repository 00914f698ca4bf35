"""How vectors travel."""

from __future__ import annotations

from decentral.protocols.codecs.blockwise import Int8
from decentral.protocols.codecs.codec import CODECS, Codec, CodecField, Wrapper
from decentral.protocols.codecs.coder import Coder, Reduce
from decentral.protocols.codecs.dense import BFloat16, Float32
from decentral.protocols.codecs.feedback import ErrorFeedback

CODECS.update({codec.name: codec for codec in (Float32, BFloat16, Int8, ErrorFeedback)})

__all__ = [
    "CODECS",
    "BFloat16",
    "Codec",
    "CodecField",
    "Coder",
    "ErrorFeedback",
    "Float32",
    "Int8",
    "Reduce",
    "Wrapper",
]
