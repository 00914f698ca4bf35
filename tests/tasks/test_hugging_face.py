"""Models of `transformers` as tasks and as sequences of blocks: held to `transformers`' own forward pass and loss."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, LlamaConfig, LlamaForCausalLM

from decentral.config import Run, validated
from decentral.errors import ConfigError, TaskError
from decentral.replica import initial_model
from decentral.sim.simulate import simulate
from decentral.tasks import ByteGPT, HFCausalLM, decoder_blocks, logits_of

WORDS, LENGTH, WIDTH = 61, 12, 16
SENTENCE = "the quick brown fox jumps over the lazy dog and goes home\n"


def gpt2(**fields: Any) -> GPT2LMHeadModel:
    """A model of a user's own, which our task has not made."""
    sizes = {"vocab_size": WORDS, "n_positions": 32, "n_embd": WIDTH, "n_layer": 3, "n_head": 2}
    return randomised(GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": None, "eos_token_id": None, **fields})))


def llama(**fields: Any) -> LlamaForCausalLM:
    """A model of a user's own; of four heads two share their keys and values."""
    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return randomised(LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **fields})))


def randomised(model: Any) -> Any:
    """Make gains and biases count, which begin as ones and zeros."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def ids(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(7))


def in_turn(blocks: list[nn.Module], values: Tensor) -> Tensor:
    for block in blocks:
        values = block(values)
    return values


def gradients(model: nn.Module, logits: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    return list(torch.autograd.grad((logits * weights).sum(), list(model.parameters())))


NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS = {
    "gpt2": lambda: gpt2(**NO_DROPOUT),
    "gpt2, untied": lambda: gpt2(**NO_DROPOUT, tie_word_embeddings=False),
    "gpt2, scaled by layer": lambda: gpt2(**NO_DROPOUT, scale_attn_by_inverse_layer_idx=True, n_inner=24),
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, stretched positions": lambda: llama(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_in_turn_are_the_models_own_forward_pass_and_gradient_bit_for_bit(
    name: str, attention: str, training: bool
) -> None:
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    model.train(training)
    for tokens in (ids(), ids(batch=1), ids(length=1)):
        ours, theirs = in_turn(decoder_blocks(model), tokens), model(input_ids=tokens, use_cache=False).logits
        assert ours.equal(theirs)
        for mine, other in zip(gradients(model, ours), gradients(model, theirs), strict=True):
            assert mine.equal(other)


def test_dropout_is_drawn_in_the_models_order() -> None:
    model = gpt2(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3).train()
    outputs = []
    for forward in (lambda: in_turn(decoder_blocks(model), ids()), lambda: model(ids()).logits):
        torch.manual_seed(11)
        outputs.append(forward())
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(in_turn(decoder_blocks(model.eval()), ids()))


@pytest.mark.parametrize("name", MODELS)
def test_one_tensor_goes_from_block_to_block(name: str) -> None:
    """On the meta device too, where a pipeline asks for shapes and costs."""
    with torch.device("meta"):
        values, shapes = ids().to("meta"), []
        for block in decoder_blocks(MODELS[name]()):
            values = block(values)
            shapes.append(tuple(values.shape))
    assert shapes == [(3, LENGTH, WIDTH)] * 4 + [(3, LENGTH, WORDS)]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_blocks_hold_the_models_own_parameters(make: Any, tied: bool) -> None:
    model = make(tie_word_embeddings=tied)
    first, *_, last = held = [{id(parameter) for parameter in block.parameters()} for block in decoder_blocks(model)]
    assert set().union(*held) == {id(parameter) for parameter in model.parameters()}
    table = {id(model.get_input_embeddings().weight)}
    assert first & last == (table if tied else set())
    assert sum(len(block) for block in held) == len(list(model.parameters())) + tied


@pytest.mark.parametrize(
    "stranger", [nn.Linear(2, 2), GPT2Model(gpt2().config)], ids=lambda value: type(value).__name__
)
def test_a_model_of_another_class_is_named(stranger: nn.Module) -> None:
    with pytest.raises(TaskError, match=rf"not those of a {type(stranger).__name__}; return them in task.blocks"):
        decoder_blocks(stranger)


def tiny(architecture: str, **fields: Any) -> dict[str, Any]:
    """A task as a run file has it."""
    config = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, **fields.pop("config", {})}
    return {"name": "hf_causal_lm", "architecture": architecture, "context": 16, "config": config, **fields}


def made(architecture: str, **fields: Any) -> HFCausalLM:
    table = tiny(architecture, **fields)
    return HFCausalLM.model_validate({field: value for field, value in table.items() if field != "name"})


def run_of(task: dict[str, Any], **fields: Any) -> Run:
    return validated({"task": task, "fleet": {"workers": [{"count": 2}]}, **fields}, "test")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_loss_is_the_one_that_transformers_computes(architecture: str) -> None:
    task = made(architecture, config={"max_position_embeddings": 17})
    model = initial_model(task, 3)
    batch = task.batch(0, 0, 4)
    tokens = batch.long()
    assert task.loss(model, batch).item() == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)


def test_batches_are_those_of_the_byte_gpt() -> None:
    assert made("llama").batch(2, 5, 3).equal(ByteGPT(context=16).batch(2, 5, 3))


def test_logits_are_of_a_whole_model_and_of_blocks() -> None:
    model = llama()
    assert logits_of(model, ids()).equal(logits_of(nn.Sequential(*decoder_blocks(model)), ids()))


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_simulated_run_learns(architecture: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 100)
    config = {"hidden_size": 32, "tie_word_embeddings": False}
    task = tiny(architecture, corpus=str(text), eval_windows=8, config=config)
    rule, inner = {"name": "diloco", "period": 10}, {"name": "adamw", "lr": 1e-2}
    outcome = simulate(run_of(task, steps=60, batch_size=8, rule=rule, inner=inner))
    assert outcome.before["bits_per_byte"] > 7.5
    assert outcome.after["bits_per_byte"] < 1.5


@pytest.mark.parametrize(
    ("architecture", "spelt"),
    [
        ("gpt2", {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}),
        ("gpt2", {"n_embd": 24, "n_layer": 1, "n_head": 3}),
        ("llama", {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}),
    ],
)
def test_the_configuration_is_what_is_given(architecture: Any, spelt: dict[str, int]) -> None:
    model = HFCausalLM(architecture=architecture, config=spelt, context=48).model()
    assert isinstance(model, {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}[architecture])
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 1, 3)
    assert (config.vocab_size, config.max_position_embeddings) == (256, 48)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "bert"}, "architecture: .*'gpt2' or 'llama'"),
        ({"config": {"hiden_size": 16}}, "unknown field 'hiden_size'; GPT2Config has .*, hidden_size, "),
        ({"config": {"n_embd": "many"}}, "no gpt2 can be made: .*'n_embd' expected int, got str"),
        ({"config": {"n_embd": 30, "n_head": 4}}, "no gpt2 can be made: .*must be divisible by num_heads"),
        ({"architecture": "llama", "config": {"hidden_size": 30}}, "no llama can be made: .*not a multiple"),
        ({"config": {"activation_function": "step"}}, "no gpt2 can be made: KeyError: 'step'"),
        ({"config": {"vocab_size": 100}}, "vocab_size=100, but bytes need at least 256"),
        ({"config": {"n_positions": 64}}, "64 positions, but context=128 needs as many"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_with_the_run_file(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)^test: task.*{message}"):
        run_of({"name": "hf_causal_lm", **fields})


def test_a_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = run_of({"name": "hf_causal_lm"}), llama()
    monkeypatch.setitem(sys.modules, "transformers", None)
    for use in (run.make_task, lambda: decoder_blocks(model)):
        with pytest.raises(ConfigError, match=r"^Hugging Face's models need .* pip install 'decentral\[hf\]'$"):
            use()
