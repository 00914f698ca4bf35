"""`HFCausalLM`: causal language models of Hugging Face's `transformers`, made from a configuration."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from decentral.tasks.corpus import VOCABULARY, ByteText
from decentral.tasks.decoders import decoder_blocks, logits_of, require_transformers


class HFCausalLM(ByteText):
    """A GPT-2 or a Llama of `transformers` that starts from random weights, never from downloaded ones.

    What it trains has the names that `transformers` gives it: `load_state_dict` of a model with the same configuration
    takes it. Needs the extra `decentral[hf]`, and raises `ConfigError` where that is not installed.
    """

    name: ClassVar[str] = "hf_causal_lm"

    architecture: Literal["gpt2", "llama"] = "gpt2"
    """`GPT2LMHeadModel` or `LlamaForCausalLM`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of `GPT2Config` or `LlamaConfig`, under their names there.

    Where nothing is given the model is small (128 features, 4 layers, 4 heads, Llama's `intermediate_size` 352) and has
    a vocabulary of 256 bytes, `context` positions and no dropout; all else is as in `transformers`, which ties GPT-2's
    embedding to its head.
    """

    @model_validator(mode="after")
    def _config_makes_a_model(self) -> HFCausalLM:
        cls = self._config_class()
        # `transformers` would keep a misspelt field without a word.
        known = {*cls().to_dict(), *cls.attribute_map}
        for field in self.config:
            if field not in known:
                raise ValueError(f"config: unknown field '{field}'; {cls.__name__} has {', '.join(sorted(known))}")
        try:
            with torch.device("meta"):  # the configuration checks some of its fields, the model others
                config: Any = self.model().config
        except Exception as error:  # theirs have no base class in common
            raise ValueError(f"config: no {self.architecture} can be made: {type(error).__name__}: {error}") from error
        if config.vocab_size < VOCABULARY:
            raise ValueError(f"config: vocab_size={config.vocab_size}, but bytes need at least {VOCABULARY}")
        if config.max_position_embeddings < self.context:
            raise ValueError(
                f"config: {config.max_position_embeddings} positions, but context={self.context} needs as many; leave "
                "them out, or give more"
            )
        return self

    def model(self) -> nn.Module:
        """Return a new model of `transformers`, which `logits_of` calls."""
        cls = self._config_class()
        fields = {
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": self.context,
            # No byte begins or ends a text, and training has no use for the keys and values of earlier calls.
            "bos_token_id": None,
            "eos_token_id": None,
            "use_cache": False,
            **_KINDS[self.architecture].small,
            **self.config,
        }
        # A field of ours may have another name in what was given: `n_embd` is GPT-2's `hidden_size`.
        config = cls(**{cls.attribute_map.get(name, name): value for name, value in fields.items()})
        model: nn.Module = getattr(require_transformers(), _KINDS[self.architecture].model)(config)
        return model

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Return the embedding, the decoder layers and the head."""
        return decoder_blocks(model)

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Return what the model makes of bytes: [B, T] int64 -> [B, T, vocabulary] float32."""
        return logits_of(model, tokens)

    def _config_class(self) -> Any:
        return getattr(require_transformers(), _KINDS[self.architecture].config)


class _Kind(NamedTuple):
    """The classes of an architecture in `transformers`, and what makes it small besides what all have."""

    config: str
    model: str
    small: dict[str, Any]


_KINDS = {
    "gpt2": _Kind("GPT2Config", "GPT2LMHeadModel", {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}),
    "llama": _Kind("LlamaConfig", "LlamaForCausalLM", {"intermediate_size": 352}),
}
