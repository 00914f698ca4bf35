"""examples/hf_llm: what is trained there is a folder that `transformers` loads."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from decentral import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the examples are no part of the package

from examples.hf_llm import save, trainer  # noqa: E402

QUICK = ["steps=4", "batch_size=2", "rule.period=2", "evaluate_every=0", "inner.warmup_steps=0", "task.context=16"]
QUICK += ["task.eval_windows=4", "task.config.num_hidden_layers=2", "sim.processes=1"]
STAGES = ["pipeline.stages=2", "pipeline.microbatches=2", "fleet.workers=[{count=4}]"]


@pytest.mark.parametrize("more", [[], STAGES], ids=["whole", "in two stages"])
def test_a_saved_run_has_the_logits_of_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    settings = [word for setting in [*QUICK, *more] for word in ("--set", setting)]
    command = ["decentral", "simulate", "examples/hf_llm/run.toml", *settings, "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    save.main(tmp_path / "run", tmp_path / "llama")
    loaded, trained = AutoModelForCausalLM.from_pretrained(tmp_path / "llama"), save.trained(tmp_path / "run")
    ids = torch.arange(16)[None]
    assert isinstance(loaded, LlamaForCausalLM)
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert "it writes\n\ndef __init__(self, " in capsys.readouterr().out


def test_the_tokenizer_takes_texts_for_their_bytes(tmp_path: Path) -> None:
    save.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def né(): return '\t\N{SNOWMAN}'\n" + "".join(map(chr, range(256)))
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_hugging_faces_trainer_trains_and_saves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("DECENTRAL_SECRET", "of-this-test-alone")
    monkeypatch.setenv("DECENTRAL_ADDRESS", address)
    monkeypatch.setenv("DECENTRAL_WORKERS", "1")
    monkeypatch.setenv("DECENTRAL_WORKER", "0")
    trainer.main(str(tmp_path), 20)
    assert f"{tmp_path} has what 1 workers have trained" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 4
