"""Conversion of a GGUF file into a Hugging Face directory of bfloat16 weights.

transformers dequantizes the file as it reads it, but refuses to save the model that results.
Therefore the weights move into a model of the same config without the quantization entry.
"""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from distillm_ray.errors import ModelError
from distillm_ray.files import new_directory

_NOT_IN_A_CLEAN_CONFIG = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "dtype",
)


def convert_gguf(file: Path, out: Path) -> None:
    """Write weights, configs, tokenizer and chat template to `out`, completely or not at all.

    Raises:
        ModelError: `file` is missing, or has no chat template or end token.
    """
    if not file.is_file():
        raise ModelError(f"{file} does not exist")
    folder, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise ModelError(f"{file} must have a chat template and an end token")
    if _field(file, "tokenizer.ggml.pre") == "smollm":
        # SmolLM2 splits numbers into digits before the byte-level split; the converter of
        # transformers omits the first step.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    values = {
        key: value
        for key, value in read.config.to_dict().items()
        if key not in _NOT_IN_A_CLEAN_CONFIG
    }
    values.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model = AutoModelForCausalLM.from_config(type(read.config)(**values), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _field(file: Path, key: str) -> object:
    field = GGUFReader(str(file)).fields.get(key)
    return None if field is None else field.contents()
