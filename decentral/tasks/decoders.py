"""`decoder_blocks`: causal language models of Hugging Face's `transformers` as sequences that a pipeline can cut."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from decentral.errors import ConfigError, TaskError


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the embedding, the decoder layers and the head of a `GPT2LMHeadModel` or a `LlamaForCausalLM`.

    For `Task.blocks`. Each takes and returns one tensor: token ids [B, T] int64 go into the first, [B, T, hidden] from
    block to block, logits [B, T, vocabulary] come out of the last. Run one after the other they are
    `model(ids, use_cache=False).logits` to the bit: what the model makes once for all of its layers, each layer makes
    anew from the length. They hold the model's own modules, so parameters stay the model's, under their names there,
    and a tied one is in two blocks.

    Raises `TaskError` for another model, and `ConfigError` where the extra `decentral[hf]` is not installed.
    """
    known = require_transformers()
    if isinstance(model, known.GPT2LMHeadModel):
        body = model.transformer
        layers = [_Layer(layer, model.config) for layer in body.h]
        return [_Embedding(body), *layers, nn.Sequential(body.ln_f, model.lm_head)]
    if isinstance(model, known.LlamaForCausalLM):
        body = model.model
        layers = [_Layer(layer, model.config, body.rotary_emb) for layer in body.layers]
        return [body.embed_tokens, *layers, nn.Sequential(body.norm, model.lm_head)]
    raise TaskError(
        f"decoder_blocks() knows the blocks of GPT2LMHeadModel and LlamaForCausalLM, not those of a "
        f"{type(model).__name__}; return them in task.blocks yourself"
    )


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the model's logits [B, T, vocabulary] for token ids [B, T] int64.

    For `Task.loss`, which also sees a pipeline's last stage in place of the model: the one answers with an output of
    `transformers`, the other with the tensor that its last block returns.
    """
    answer = model(ids)
    logits: Tensor = answer if isinstance(answer, Tensor) else answer.logits
    return logits


def require_transformers() -> ModuleType:
    """Return the package; raises `ConfigError` where the extra `decentral[hf]` is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("Hugging Face's models need another package: pip install 'decentral[hf]'") from None
    package: ModuleType = transformers
    return package


class _Embedding(nn.Module):
    """[B, T] int64 -> [B, T, hidden]: tokens, positions and dropout of GPT-2."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = body.wte, body.wpe, body.drop

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.dropout(self.tokens(ids) + self.positions(_positions(ids)))
        return hidden


class _Layer(nn.Module):
    """[B, T, hidden] -> [B, T, hidden]: a decoder layer and what the model gives it besides: mask, rotary embedding."""

    def __init__(self, layer: nn.Module, config: Any, rotary: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.config, self.rotary = layer, config, rotary

    def forward(self, hidden: Tensor) -> Tensor:
        given = {"attention_mask": _causal_mask(self.config, hidden)}
        if self.rotary is not None:
            given["position_embeddings"] = self.rotary(hidden, _positions(hidden))
        out: Tensor = self.layer(hidden, **given)
        return out


def _causal_mask(config: Any, hidden: Tensor) -> Any:
    """Return the mask in the form that the attention of the configuration takes; None where it needs none."""
    from transformers.masking_utils import create_causal_mask

    # No positions: it would look into them for texts that follow one another, and on the meta device there is nothing.
    return create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)


def _positions(values: Tensor) -> Tensor:
    """Return [1, T]: 0 .. T - 1, for values [B, T, ...]."""
    return torch.arange(values.shape[1], device=values.device)[None]
