"""Tiny random models of the architectures of transformers, and what this program does with them.

    python -m tests.architectures        print the table of docs/architectures.md

tests/test_architectures.py compares the expectations with what happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distillm_ray.models.packed_attention import BY_SEQUENCE

NUM_ROWS = 64  # of the output heads
CONTEXT = 128  # tokens, of the models with a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model, and how it should run.

    Args:
        settings: keyword arguments of the config.
        attention: the implementation that packed rows and single sequences run with.
        packs_up_to: `RowPath.packs_up_to`.
        why: the reason, for a user, why `packs_up_to` is not None, or why the model is refused.
        notes: a part of each of the path's notes.
        refused: a part of the message that refuses the model.
        vllm: whether vLLM knows the class.
        transformers: how the transformers engine generates with it.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(repr=False)
    attention: str = BY_SEQUENCE
    packs_up_to: int | None = None
    why: str = ""
    notes: tuple[str, ...] = ()
    refused: str = ""
    vllm: bool = True
    transformers: Literal["any batch", "one length", "fails"] = "any batch"

    @property
    def class_name(self) -> str:
        """The class in transformers, which config.json names in `architectures`."""
        return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]

    @property
    def config(self) -> PretrainedConfig:
        """A config of a few thousand parameters."""
        return AutoConfig.for_model(self.model_type, **self.settings)

    def build(self) -> PreTrainedModel:
        """A random model in float32. Every matrix has an effect, as in a trained model."""
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        _spread(model)
        return model


def _spread(model: PreTrainedModel) -> None:
    """Draw each matrix with the variance 1 / inputs, so that outputs are as large as inputs."""
    embedding = model.get_input_embeddings().weight
    numbers = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                continue
            experts = parameter.ndim == 3 and parameter.shape[1] > 1
            inputs = parameter.shape[-1] if experts else parameter[0].numel()
            scale = 1.0 if parameter is embedding else inputs**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=numbers) * scale)


# ---- settings that several configs share ---------------------------------------------------------

IDS = {"vocab_size": NUM_ROWS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN: dict[str, Any] = IDS | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GPT2: dict[str, Any] = IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
SSM: dict[str, Any] = IDS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
WINDOW: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ROUTED: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {  # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
WITHOUT_QUERY_RANK: dict[str, Any] = LATENT | {"q_lora_rank": None}
HYBRID: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"]}
DELTA: dict[str, Any] = HYBRID | {  # gated delta net
    "head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
MPT: dict[str, Any] = IDS | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT}
WIDTH8: dict[str, Any] = {"head_dim": 8}

# ---- expectations that several architectures share -----------------------------------------------

CONVOLUTION = "convolutions read over the start of a sequence"
RECURRENCE = "a recurrence runs over the start of a sequence"
CHUNKS = "attention in chunks that start with the row"
POSITIONS = "positions that do not start anew with a sequence"
LEAKS = "state leaks from one sequence of a row into the next"
STATE = "its layers keep state along a row"


def packed(
    name: str,
    model_type: str,
    base: Mapping[str, Any] = PLAIN,
    *,
    attention: str = BY_SEQUENCE,
    notes: tuple[str, ...] = (),
    vllm: bool = True,
    transformers: Literal["any batch", "one length", "fails"] = "any batch",
    without: tuple[str, ...] = (),
    **settings: Any,
) -> Architecture:
    """An architecture that runs packed rows.

    Args:
        without: keys of `base` that the config does not know.
    """
    values = {key: value for key, value in base.items() if key not in without} | settings
    return Architecture(
        name=name,
        model_type=model_type,
        settings=values,
        attention=attention,
        notes=notes,
        vllm=vllm,
        transformers=transformers,
    )


def single(
    name: str,
    model_type: str,
    why: str,
    base: Mapping[str, Any] = PLAIN,
    *,
    attention: str = "sdpa",
    note: str = STATE,
    **others: Any,
) -> Architecture:
    """An architecture that runs one sequence a pass because of `why`."""
    one = packed(name, model_type, base, attention=attention, notes=(note,), **others)
    return replace(one, packs_up_to=0, why=why)


_DENSE = ("num_key_value_heads", "intermediate_size")
_BLOOM = (*_DENSE, "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_GPT_NEO = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")

ARCHITECTURES: tuple[Architecture, ...] = (
    # ---- dense -----------------------------------------------------------------------------------
    packed("Llama 2, 3", "llama"),
    packed("Llama, tied", "llama", tie_word_embeddings=True),
    packed("Qwen2, Qwen2.5", "qwen2"),
    packed(
        "Qwen2, sliding window",
        "qwen2",
        use_sliding_window=True,
        max_window_layers=1,
        sliding_window=8,
    ),
    packed("Qwen3", "qwen3", **WIDTH8),
    packed("Mistral", "mistral", sliding_window=8),
    packed("Ministral", "ministral", vllm=False, **WIDTH8, **WINDOW),
    packed("Ministral 3", "ministral3", **WIDTH8),
    packed("Gemma", "gemma", **WIDTH8),
    packed("Gemma 2", "gemma2", query_pre_attn_scalar=8, **WIDTH8, **WINDOW),
    packed("Gemma 3 text", "gemma3_text", query_pre_attn_scalar=8, **WIDTH8, **WINDOW),
    packed(
        "Gemma 3n text",
        "gemma3n_text",
        vocab_size_per_layer_input=NUM_ROWS,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0, 0.0],
        **WIDTH8,
        **WINDOW,
    ),
    packed(
        "Gemma 4 text",
        "gemma4_text",
        vocab_size_per_layer_input=NUM_ROWS,
        hidden_size_per_layer_input=8,
        **WIDTH8,
        **WINDOW,
    ),
    packed("VaultGemma", "vaultgemma", query_pre_attn_scalar=8, **WIDTH8, **WINDOW),
    packed("Phi 1, 1.5, 2", "phi"),
    packed("Phi-3", "phi3", sliding_window=8),
    replace(
        packed(
            "Phi-3, long context",
            "phi3",
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 24,
            },
            original_max_position_embeddings=24,
            notes=("rope_type longrope depends on a row's longest sequence",),
        ),
        packs_up_to=24,
        why="frequencies that depend on the longest sequence of a row",
    ),
    packed("GPT-2", "gpt2", GPT2),
    packed("GPT-J", "gptj", GPT2, attention="eager", rotary_dim=4),
    packed(
        "GPT-Neo",
        "gpt_neo",
        attention="eager",
        vllm=False,
        without=_GPT_NEO,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
    ),
    packed("GPT-NeoX, Pythia", "gpt_neox", without=("num_key_value_heads",)),
    packed("GPT-BigCode", "gpt_bigcode", GPT2),
    packed("CodeGen", "codegen", GPT2, attention="eager", vllm=False, rotary_dim=4),
    packed(
        "OPT",
        "opt",
        without=_DENSE,
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    packed("OLMo", "olmo"),
    packed("OLMo 2", "olmo2"),
    packed("OLMo 3", "olmo3", **WINDOW),
    packed(
        "Granite",
        "granite",
        logits_scaling=4.0,
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
        residual_multiplier=0.5,
    ),
    packed("Granite SWA", "granite_swa", logits_scaling=4.0, **WINDOW),
    packed("Cohere", "cohere", logit_scale=0.5),
    packed("Cohere 2", "cohere2", logit_scale=0.5, **WIDTH8, **WINDOW),
    packed("SmolLM3", "smollm3", no_rope_layers=[1, 0]),
    packed("StableLM", "stablelm", attention="sdpa"),
    packed("Persimmon", "persimmon", vllm=False, without=("num_key_value_heads",)),
    packed("StarCoder2", "starcoder2", sliding_window=8),
    packed("Nemotron", "nemotron", attention="sdpa", notes=("does not hand arguments on",)),
    packed("EXAONE 4", "exaone4", **WINDOW),
    packed("ERNIE 4.5", "ernie4_5", **WIDTH8),
    packed("Hunyuan dense", "hunyuan_v1_dense", **WIDTH8),
    packed("GLM", "glm", **WIDTH8),
    packed("GLM-4", "glm4", **WIDTH8),
    packed("Helium", "helium", vllm=False, **WIDTH8),
    packed("Seed-OSS", "seed_oss", **WIDTH8),
    packed("Arcee", "arcee", **WIDTH8),
    packed("Apertus", "apertus"),
    packed("BitNet", "bitnet", vllm=False),
    packed("NanoChat", "nanochat", vllm=False, num_key_value_heads=4),
    packed("HyperCLOVA X", "hyperclovax", logits_scaling=0.5, **WIDTH8),
    packed("DiffLlama", "diffllama", vllm=False),
    packed("Doge", "doge", attention="sdpa", vllm=False, notes=("makes its own attention mask",)),
    packed("MiniCPM3", "minicpm3", dim_model_base=16, **WIDTH8, **LATENT),
    single(
        "Falcon",
        "falcon",
        POSITIONS,
        note=LEAKS,
        without=_DENSE,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    replace(
        packed(
            "Falcon with ALiBi",
            "falcon",
            without=_DENSE,
            alibi=True,
            multi_query=False,
            parallel_attn=False,
            num_kv_heads=4,
        ),
        why="two ways of transformers disagree",
        refused="alibi must be false",
    ),
    single(
        "BLOOM",
        "bloom",
        POSITIONS,
        attention="eager",
        note=LEAKS,
        without=_BLOOM,
        n_layer=2,
        n_head=4,
    ),
    single(
        "MPT",
        "mpt",
        POSITIONS,
        MPT,
        attention="eager",
        note=LEAKS,
        vllm=False,
        expansion_ratio=2,
    ),
    single(
        "XGLM",
        "xglm",
        POSITIONS,
        IDS,
        attention="eager",
        note=LEAKS,
        vllm=False,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=CONTEXT,
    ),
    single(
        "BioGPT",
        "biogpt",
        POSITIONS,
        note=LEAKS,
        vllm=False,
        without=("num_key_value_heads",),
    ),
    # ---- mixtures of experts ---------------------------------------------------------------------
    packed("Mixtral", "mixtral", num_local_experts=4),
    packed("Qwen2-MoE", "qwen2_moe", shared_expert_intermediate_size=16, **EXPERTS),
    packed("Qwen3-MoE", "qwen3_moe", **WIDTH8, **EXPERTS),
    packed("Phi-MoE", "phimoe", vllm=False, num_local_experts=4),
    packed("OLMoE", "olmoe", num_experts=4, num_experts_per_tok=2),
    packed("FlexOlmo", "flex_olmo", num_experts=4, num_experts_per_tok=2),
    packed("Granite-MoE", "granitemoe", num_local_experts=4, logits_scaling=4.0),
    packed(
        "Granite-MoE, shared expert",
        "granitemoeshared",
        num_local_experts=4,
        logits_scaling=4.0,
        shared_intermediate_size=16,
    ),
    packed(
        "ERNIE 4.5 MoE",
        "ernie4_5_moe",
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
    ),
    packed("Hunyuan MoE", "hunyuan_v1_moe", num_experts=4, moe_topk=2, **WIDTH8),
    packed("GLM-4-MoE", "glm4_moe", **WIDTH8, **ROUTED),
    packed("DeepSeek-V2", "deepseek_v2", n_shared_experts=1, **ROUTED, **LATENT),
    packed(
        "DeepSeek-V3",
        "deepseek_v3",
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        **ROUTED,
        **LATENT,
    ),
    packed(
        "LongCat-Flash",
        "longcat_flash",
        without=("num_hidden_layers", "intermediate_size"),
        num_layers=1,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        **WIDTH8,
        **LATENT,
    ),
    packed(
        "GPT-OSS",
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **WIDTH8,
        **WINDOW,
    ),
    packed("MiniMax-M2", "minimax_m2", num_local_experts=4, num_experts_per_tok=2, **WIDTH8),
    packed(
        "dots.1",
        "dots1",
        vllm=False,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        **WIDTH8,
        **ROUTED,
    ),
    packed(
        "DBRX",
        "dbrx",
        MPT,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={
            "ffn_hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "hidden_size": 32,
        },
    ),
    packed(
        "JetMoe",
        "jetmoe",
        vllm=False,
        without=("num_attention_heads",),
        num_local_experts=4,
        kv_channels=8,
    ),
    single(
        "Llama 4 text",
        "llama4_text",
        CHUNKS,
        intermediate_size_mlp=64,
        num_local_experts=4,
        attention_chunk_size=8,
        no_rope_layer_interval=2,
        interleave_moe_layer_step=2,
        **WIDTH8,
    ),
    # ---- convolutions and recurrences ------------------------------------------------------------
    single(
        "LFM2",
        "lfm2",
        CONVOLUTION,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    ),
    single(
        "LFM2-MoE",
        "lfm2_moe",
        CONVOLUTION,
        layer_types=["conv", "full_attention"],
        num_dense_layers=1,
        **EXPERTS,
    ),
    single(
        "Qwen3-Next",
        "qwen3_next",
        RECURRENCE,
        shared_expert_intermediate_size=16,
        **EXPERTS,
        **DELTA,
    ),
    single("Qwen3.5 text", "qwen3_5_text", RECURRENCE, **DELTA),
    single(
        "Granite 4 hybrid",
        "granitemoehybrid",
        RECURRENCE,
        num_local_experts=4,
        shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
        logits_scaling=4.0,
        **MAMBA2,
    ),
    single("Bamba", "bamba", RECURRENCE, vllm=False, attn_layer_indices=[1], **MAMBA2),
    single(
        "Falcon-H1",
        "falcon_h1",
        RECURRENCE,
        mamba_d_ssm=64,
        lm_head_multiplier=0.5,
        **MAMBA2,
    ),
    single("Mamba", "mamba", RECURRENCE, SSM, attention="eager"),
    single(
        "Mamba 2",
        "mamba2",
        RECURRENCE,
        SSM,
        attention="eager",
        num_heads=8,
        n_groups=1,
        chunk_size=8,
        **WIDTH8,
    ),
    single("Falcon-Mamba", "falcon_mamba", RECURRENCE, SSM, attention="eager"),
    single(
        "Jamba",
        "jamba",
        RECURRENCE,
        num_experts=4,
        mamba_d_state=8,
        mamba_dt_rank=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    single(
        "Nemotron-H",
        "nemotron_h",
        RECURRENCE,
        without=("num_hidden_layers",),
        layers_block_type=["linear_attention", "full_attention"],
        ssm_state_size=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=1,
        chunk_size=8,
        use_mamba_kernels=False,
        **WIDTH8,
    ),
    single(
        "OLMo hybrid",
        "olmo_hybrid",
        RECURRENCE,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        **HYBRID,
    ),
    single(
        "Zamba 2",
        "zamba2",
        RECURRENCE,
        num_key_value_heads=4,
        mamba_d_state=8,
        n_mamba_heads=8,
        mamba_headdim=8,
        chunk_size=8,
        layers_block_type=["mamba", "hybrid"],
        use_mem_rope=True,
        use_mamba_kernels=False,
    ),
    single(
        "Kimi Linear",
        "kimi_linear",
        RECURRENCE,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_token=2,
        first_k_dense_replace=1,
        linear_head_dim=8,
        linear_num_heads=4,
        **HYBRID,
        **WIDTH8,
        **WITHOUT_QUERY_RANK,
    ),
    single(
        "MiniMax",
        "minimax",
        RECURRENCE,
        vllm=False,
        transformers="one length",
        num_local_experts=4,
        block_size=8,
        **HYBRID,
        **WIDTH8,
    ),
    single(
        "RecurrentGemma",
        "recurrent_gemma",
        RECURRENCE,
        vllm=False,
        transformers="one length",
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "attention"],
        **WIDTH8,
    ),
    single(
        "RWKV",
        "rwkv",
        RECURRENCE,
        IDS,
        attention="eager",
        vllm=False,
        transformers="one length",
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=2,
        context_length=CONTEXT,
    ),
    single(
        "xLSTM",
        "xlstm",
        RECURRENCE,
        IDS,
        attention="eager",
        vllm=False,
        transformers="fails",
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=2,
        chunk_size=16,
    ),
)


def by_name(name: str) -> Architecture:
    """The architecture called `name`."""
    [found] = [one for one in ARCHITECTURES if one.name == name]
    return found


def table() -> str:
    """The table of docs/architectures.md."""
    lines = [
        "| Architecture | Class | Training and scoring | Generation |",
        "|---|---|---|---|",
    ]
    for one in ARCHITECTURES:
        match one:
            case Architecture(refused="", packs_up_to=None):
                rows = "packed rows"
            case Architecture(refused="", packs_up_to=0, why=why):
                rows = f"one sequence a pass: {why}"
            case Architecture(refused="", why=why):
                rows = f"packed rows, one sequence a pass if it is long: {why}"
            case Architecture(why=why):
                rows = f"refused: {why}"
        lines.append(f"| {one.name} | `{one.class_name}` | {rows} | {_engines(one)} |")
    return "\n".join(lines) + "\n"


def _engines(one: Architecture) -> str:
    engines = ["vLLM"] if one.vllm else []
    match one.transformers:
        case "any batch":
            engines.append("transformers")
        case "one length":
            engines.append("transformers (prompts of one length in a batch)")
        case "fails":
            pass
    return "–" if one.refused or not engines else ", ".join(engines)


if __name__ == "__main__":
    print(table(), end="")
