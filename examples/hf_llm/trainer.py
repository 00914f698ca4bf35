"""The same Llama trained by Hugging Face's own `Trainer`, which one callback makes a worker of a run.

export DECENTRAL_SECRET=$(openssl rand -hex 32) DECENTRAL_ADDRESS=127.0.0.1:29600 DECENTRAL_WORKERS=2
DECENTRAL_WORKER=1 python -m examples.hf_llm.trainer runs/trainer-1 &
DECENTRAL_WORKER=0 python -m examples.hf_llm.trainer runs/trainer-0
"""

from __future__ import annotations

import os
import sys

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import decentral
from decentral.embedded.hf import DecentralCallback
from decentral.protocols import DiLoCo, Nesterov
from decentral.tasks import HFCausalLM

BATCH = 8


class Windows(Dataset[dict[str, Tensor]]):
    """A worker's windows of 128 bytes of Python's standard library."""

    def __init__(self, worker: int, count: int) -> None:
        self._text, self._worker, self._count = HFCausalLM(architecture="llama", context=128), worker, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        window = self._text.batch(self._worker, number, 1)[0, :-1].long()
        return {"input_ids": window, "labels": window}


def main(out: str, steps: int) -> None:
    torch.manual_seed(0)  # all workers begin with the same weights
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    worker = int(os.environ["DECENTRAL_WORKER"])
    with decentral.join(rule=DiLoCo(period=20, outer=Nesterov(lr=1.0, momentum=0.5))) as fleet:
        trainer = Trainer(
            model, arguments, train_dataset=Windows(worker, BATCH * steps), callbacks=[DecentralCallback(fleet)]
        )
        trainer.train()
    trainer.save_model()
    print(f"worker {worker}: {out} has what {fleet.workers} workers have trained")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 400)
