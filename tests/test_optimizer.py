"""Weight decay holds on matrices alone, and is the config's also after a checkpoint is loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from distillm_ray.config import LearnerConfig, LoraConfig
from distillm_ray.learner.optimizer import build_optimizer, set_hyperparameters
from distillm_ray.learner.student_model import add_adapters
from tests import make


def config(**changes: Any) -> LearnerConfig:
    return LearnerConfig(**({"steps": 1, "batch_size": 1, "learning_rate": 0.5} | changes))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=9))


def names_by_decay(model: nn.Module) -> tuple[set[str], set[str]]:
    """Last parts of the names of the parameters that decay, and of those that do not."""
    names = {id(value): name for name, value in model.named_parameters()}
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = build_optimizer(config(weight_decay=0.1), trained)
    found: dict[float, set[str]] = {0.1: set(), 0.0: set()}
    for group in optimizer.param_groups:
        for value in group["params"]:
            name = names[id(value)].removesuffix(".default.weight").removesuffix(".weight")
            found[group["weight_decay"]].add(name.rpartition(".")[2])
    return found[0.1], found[0.0]


def test_a_llama_decays_its_matrices_and_embeddings_and_not_its_norms() -> None:
    decayed, others = names_by_decay(make.llama())
    assert decayed == {
        *("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "lm_head"),
    }
    assert others == {"input_layernorm", "post_attention_layernorm", "norm"}


def test_gpt2_decays_neither_biases_nor_norms() -> None:
    decayed, others = names_by_decay(gpt2())
    assert decayed == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert others == {"bias", "ln_1", "ln_2", "ln_f"}


def test_adapters_decay_and_an_empty_group_is_not_made() -> None:
    model = make.llama()
    add_adapters(model, LoraConfig(rank=2, alpha=4.0))
    assert names_by_decay(model) == ({"lora_A", "lora_B"}, set())
    trained = [value for value in model.parameters() if value.requires_grad]
    assert len(build_optimizer(config(), trained).param_groups) == 1


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_without_gradient_shrinks_matrices_by_rate_times_decay(kind: str) -> None:
    matrix, vector = (nn.Parameter(torch.ones(shape)) for shape in ((2, 2), (2,)))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    build_optimizer(config(weight_decay=0.1, optimizer=kind), [matrix, vector]).step()
    assert torch.allclose(matrix.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))
    assert torch.equal(vector.detach(), torch.ones(2))


def test_the_config_holds_also_where_a_checkpoint_says_something_else() -> None:
    parameters = list(make.llama().parameters())
    before = build_optimizer(config(weight_decay=0.1, adam_betas=(0.8, 0.9)), parameters)
    now = config(weight_decay=0.3, adam_betas=(0.7, 0.6), adam_epsilon=0.5)
    optimizer = build_optimizer(now, parameters)
    optimizer.load_state_dict(before.state_dict())
    set_hyperparameters(optimizer, now)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert all(group["betas"] == (0.7, 0.6) for group in optimizer.param_groups)
    assert all(group["eps"] == 0.5 for group in optimizer.param_groups)
