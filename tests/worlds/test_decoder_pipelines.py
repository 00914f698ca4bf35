"""Models of `transformers` cut into stages train as the whole ones, in virtual time and over sockets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sockets import train_here
from test_pipelines import run_of
from test_same_rule import assert_same_replicas
from torch import Tensor, nn

from decentral.errors import TaskError
from decentral.pipeline import cut_of
from decentral.replica import initial_model
from decentral.sim.simulate import simulate
from decentral.state import layout_of
from decentral.tasks import HFCausalLM, decoder_blocks, logits_of
from decentral.tasks.corpus import ByteText

SEED = 3
ARCHITECTURES = ["gpt2", "llama"]


def task_of(architecture: str, **config: Any) -> HFCausalLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "tie_word_embeddings": False}
    return HFCausalLM.model_validate(
        {"architecture": architecture, "context": 16, "eval_windows": 8, "config": {**sizes, **config}}
    )


class Own(ByteText):
    """A task of a user's own with a model of `transformers`."""

    def model(self) -> nn.Module:
        return task_of("llama").model()

    def logits(self, model: nn.Module, tokens: Tensor) -> Tensor:
        return logits_of(model, tokens)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return decoder_blocks(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pipeline_of_decoder_layers_trains_as_the_whole_model_does(architecture: str) -> None:
    """Sums of microbatches and of stages' squares are rounded otherwise than those of a whole batch and model."""
    table = task_of(architecture).to_table()
    whole = simulate(run_of(1, task=table))
    assert whole.after["loss"] < whole.before["loss"]
    for stages, microbatches in ((2, 1), (2, 4), (3, 1), (3, 2)):
        staged = simulate(run_of(stages, microbatches, task=table))
        assert torch.allclose(staged.merged(), whole.merged(), rtol=0, atol=1e-5)
        assert staged.after["loss"] == pytest.approx(whole.after["loss"], rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_stages_have_trained_loads_into_a_new_model_of_transformers(architecture: str) -> None:
    task = task_of(architecture)
    outcome = simulate(run_of(3, 2, task=task.to_table()))
    trained, fresh = initial_model(task, SEED), initial_model(task, SEED + 1)
    for entry in layout_of(trained).entries:
        with torch.no_grad():
            trained.get_parameter(entry.name).copy_(outcome.merged()[entry.start : entry.stop].view(entry.shape))
    fresh.load_state_dict(trained.state_dict(), strict=True)
    with torch.no_grad():
        assert task.evaluate(fresh.eval())["loss"] == pytest.approx(outcome.after["loss"], rel=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stages_name_and_order_their_parameters_as_the_model_does(architecture: str) -> None:
    task = task_of(architecture)
    cut = cut_of(task, SEED, samples=2, stages=3, cuts=None)
    names = [entry.name for layout in cut.layouts for entry in layout.entries]
    assert names == [name for name, _parameter in task.model().named_parameters()]
    assert cut.whole == layout_of(task.model())


def test_both_worlds_come_to_the_same_bits_and_bytes() -> None:
    run = run_of(3, 2, replicas=2, task=task_of("llama").to_table(), rule={"name": "diloco", "period": 5})
    assert_same_replicas(train_here(run), simulate(run))


def test_a_task_of_ones_own_takes_the_blocks() -> None:
    task = {"name": "test_decoder_pipelines:Own", "context": 16, "eval_windows": 8}
    whole, staged = (simulate(run_of(stages, task=task)) for stages in (1, 2))
    assert torch.allclose(staged.merged(), whole.merged(), rtol=0, atol=1e-5)
    assert whole.merged().equal(simulate(run_of(1, task=task_of("llama").to_table())).merged())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_embeddings_train_where_the_head_lies_on_the_first_stage(architecture: str) -> None:
    table = task_of(architecture, tie_word_embeddings=True).to_table()
    pipeline = {"stages": 3, "microbatches": 2, "head": "first"}
    whole, staged = simulate(run_of(1, task=table)), simulate(run_of(3, task=table, pipeline=pipeline))
    assert torch.allclose(staged.merged(), whole.merged(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "table"), [("gpt2", "transformer.wte.weight"), ("llama", "model.embed_tokens.weight")]
)
def test_an_embedding_tied_to_the_head_of_another_stage_is_named(architecture: str, table: str) -> None:
    with pytest.raises(TaskError, match=f"parameter '{table}' is used in the stages 0 and 1; tied weights must"):
        cut_of(task_of(architecture, tie_word_embeddings=True), SEED, samples=2, stages=2, cuts=None)
