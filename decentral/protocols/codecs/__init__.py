"""How vectors travel."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from decentral.protocols.codecs.blockwise import Int8
from decentral.protocols.codecs.codec import Codec
from decentral.protocols.codecs.dense import BFloat16, Float32
from decentral.protocols.naming import part_named

CODECS: dict[str, type[Codec]] = {codec.name: codec for codec in (Float32, BFloat16, Int8)}
CodecField = Annotated[Codec, BeforeValidator(lambda value: part_named(value, CODECS, Codec, "codec"))]

__all__ = ["CODECS", "BFloat16", "Codec", "CodecField", "Float32", "Int8"]
