"""The attention of packed rows on a GPU, with the kernels that PyTorch brings.

Axes: L packed tokens, D hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distillm_ray.models.packed import load_packed_model
from distillm_ray.models.packed_attention import BY_SEQUENCE
from distillm_ray.models.row_path import RowPath, backbone_of, run_row
from distillm_ray.models.varlen_attention import VARLEN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda")
LENGTHS = (300, 1, 129, 64, 700)
SIZES: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "grouped heads": {"model_type": "llama", **SIZES},
    "gpt2": {"model_type": "gpt2", "vocab_size": 500, "n_embd": 256, "n_layer": 2, "n_head": 4},
    "window": {"model_type": "mistral", **SIZES, "sliding_window": 100},
    "heads of 60": {"model_type": "llama", **SIZES, "head_dim": 60},
    "heads of 256": {"model_type": "llama", **SIZES, "head_dim": 256},
    "values smaller than keys": {
        "model_type": "deepseek_v3",
        **SIZES,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "first_k_dense_replace": 2,
    },
}


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SETTINGS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(GPU, dtype).eval()


def run(model: PreTrainedModel, attention: str, packs_up_to: int | None) -> Tensor:
    """Hidden states, then the gradients of all parameters, flat, in float32."""
    model.set_attn_implementation(attention)
    ids_L = torch.randint(500, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    positions_L = torch.cat([torch.arange(length) for length in LENGTHS])
    path = RowPath(attention=attention, packs_up_to=packs_up_to)
    hidden_LD = run_row(backbone_of(model), ids_L.to(GPU), positions_L.to(GPU), path).float()
    to_LD = torch.randn(hidden_LD.shape, generator=torch.Generator().manual_seed(2)).to(GPU)
    model.zero_grad()
    (hidden_LD * to_LD).sum().backward()
    gradients = [one.grad.float() for one in model.parameters() if one.grad is not None]
    return torch.cat([one.flatten() for one in (hidden_LD.detach(), *gradients)])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_row_in_bfloat16_is_as_near_to_float32_as_one_sequence_at_a_time(name: str) -> None:
    exact = run(build(name, torch.float32), "eager", 0)
    found, by_sequence = (
        (run(build(name, torch.bfloat16), attention, None) - exact).norm()
        for attention in (VARLEN, BY_SEQUENCE)
    )
    assert found <= 1.5 * by_sequence


@pytest.mark.parametrize(
    ("name", "dtype", "attention"),
    [
        *((name, torch.bfloat16, VARLEN) for name in SETTINGS),
        ("grouped heads", torch.float32, BY_SEQUENCE),
    ],
)
def test_a_student_takes_the_kernel_where_its_dtype_allows(
    name: str, dtype: torch.dtype, attention: str, tmp_path: Path
) -> None:
    build(name, dtype).save_pretrained(tmp_path)
    packed = load_packed_model(tmp_path, role="student", dtype=dtype, device=GPU)
    assert packed.path.attention == attention, packed.remark


def test_the_memory_of_a_row_grows_with_its_length() -> None:
    """A dense block mask of this row would take 256 MiB, and its scores 2 GiB."""
    model = build("grouped heads", torch.bfloat16)
    model.set_attn_implementation(VARLEN)
    length = 16 * 1024
    ids_L = torch.zeros(length, dtype=torch.long, device=GPU)
    positions_L = torch.arange(length, device=GPU) % 512
    peaks = []
    for part in (length // 2, length):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            run_row(backbone_of(model), ids_L[:part], positions_L[:part], RowPath(attention=VARLEN))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 2.2 * peaks[0]
