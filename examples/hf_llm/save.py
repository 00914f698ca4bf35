"""Turn a run's folder into one that `transformers` loads: model, configuration and tokenizer.

python -m examples.hf_llm.save runs/hf_llm runs/hf_llm/llama
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from decentral import read_run


def trained(folder: Path) -> LlamaForCausalLM:
    """Return the model that the run of this folder has trained, on the CPU."""
    model = read_run(folder / "run.toml").make_task().model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes of a text in UTF-8, each its own number."""
    shown = set(range(ord("!"), ord("~") + 1)) | set(range(ord("¡"), ord("ÿ") + 1)) - {ord("\xad")}
    # `tokenizers` writes each byte as one letter: itself if it can be seen, else one of the letters from 256 on.
    unseen = iter(range(256, 512))
    vocabulary = {chr(byte if byte in shown else next(unseen)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def main(folder: Path, out: Path) -> None:
    trained(folder).save_pretrained(out)
    byte_tokenizer().save_pretrained(out)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    torch.manual_seed(0)
    prompt = tokenizer("def __init__(self, ", return_tensors="pt")
    text = model.generate(prompt.input_ids, max_new_tokens=60, do_sample=True, temperature=0.5, use_cache=True)
    print(f"{out}: {model.num_parameters():,} parameters; it writes\n\n{tokenizer.decode(text[0])}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
