"""A trained student outside of this program: in plain transformers and plain vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests import make
from tests.integration.tiny import LIMIT_S, clean_environment

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S)]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_NEW_TOKENS = 20
PLAIN_VLLM = """
import json, sys
from vllm import LLM
engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128)
sampling = engine.get_default_sampling_params()
sampling.temperature, sampling.max_tokens = 0.0, int(sys.argv[3])
(output,) = engine.generate([{"prompt_token_ids": json.loads(sys.argv[2])}], sampling)
print("RESPONSE", json.dumps(list(output.outputs[0].token_ids)))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, whose only end token is <|endoftext|>, with a ChatML template.

    It says o, k and then <|im_end|> for ever: one layer of zeros, an embedding that is the
    identity, and a head that maps each token to its successor.
    """
    directory = tmp_path_factory.mktemp("export") / "base"
    tokenizer = make.byte_tokenizer(chat_template=CHATML)
    size = len(tokenizer)
    model = make.llama(
        vocab_size=size,
        hidden_size=288,
        num_hidden_layers=1,
        num_attention_heads=9,  # heads of 32, which vLLM's attention on a CPU supports
        num_key_value_heads=9,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        max_position_embeddings=2048,
    )
    newline, o, k = tokenizer("\nok")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    follows = {newline: o, o: k, k: end}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for token in range(size):
            model.model.embed_tokens.weight[token, token] = 1.0
            model.lm_head.weight[follows.get(token, token), token] = 1.0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    """Its `model/` after one step of SFT whose learning rate changes next to nothing."""
    folder = base.parent
    rows = [{"prompt": f"say ok to {number}", "response": "ok"} for number in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "run": {"directory": str(folder / "run"), "mode": "local"},
        "student": {"model": str(base), "dtype": "float32"},
        "data": {"train": [str(folder / "train.jsonl")], "max_prompt_tokens": 128},
        "loss": {"terms": [{"on": "dataset", "type": "cross_entropy"}]},
        "schedule": {"type": "fixed", "phi": 0.0},
        "learner": {"steps": 1, "batch_size": 4, "learning_rate": 1e-9},
        "evaluation": {"at_end": False},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    done = run("-m", "distillm_ray.cli", "train", str(folder / "config.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run" / "model"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        env=clean_environment() | environment,
        check=False,
    )


def prompt_of(directory: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    question = [{"role": "user", "content": "say ok"}]
    ids: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=False
    )
    return list(ids)


def in_transformers(directory: Path) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    prompt = prompt_of(directory)
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return ids[0, len(prompt) :].tolist()


def in_vllm(directory: Path) -> list[int]:
    prompt = json.dumps(prompt_of(directory))
    done = run(
        *("-c", PLAIN_VLLM, str(directory), prompt, str(MAX_NEW_TOKENS)),
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        TORCH_COMPILE_DISABLE="1",
        HF_HUB_OFFLINE="1",
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESPONSE ")]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("RESPONSE "))


@pytest.mark.parametrize("respond", [in_transformers, in_vllm])
def test_the_exported_model_stops_at_the_end_token_of_its_template(
    respond: Any, base: Path, trained: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = tokenizer("ok<|im_end|>")["input_ids"]
    assert len(respond(base)) == MAX_NEW_TOKENS, "the base model does not know the end token"
    assert respond(trained) == expected
