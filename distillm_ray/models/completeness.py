"""Whether a model directory holds every tensor that its config asks for.

transformers fills tensors that are missing with random numbers and drops layers that the config
does not count, with a notice that is easy to miss. Both would be distilled without a word.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from distillm_ray.errors import ModelError
from distillm_ray.models.directory import ModelFacts, key_of
from distillm_ray.models.safetensors_files import TensorInfo

_NUM_SHOWN = 3
_SILENT = 50  # of transformers' levels of logging: critical
# Enough to tell two matrices apart; a tied head that is stored twice is equal in all of them.
_COMPARED_BYTES = 16 * 2**20
_BUFFERS = (".masked_bias", ".attn.bias", ".attention.bias", ".inv_freq")
_PACKED_DTYPES = ("I8", "U8", "I32", "I64", "F8_E4M3", "F8_E5M2")
_EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


def check_complete(facts: ModelFacts, *, trust_remote_code: bool = False) -> None:
    """Compare the tensors of a directory with the modules of its model; reads no weights.

    Quantized models are left to the engine that supports them.

    Raises:
        ModelError: tensors are missing, have other shapes, or belong to layers that the config does
            not have; or a head that the config ties to the embedding is another matrix.
    """
    if "quantization_config" in facts.config:
        return
    name = f"{key_of(facts.role)}: {facts.path}"
    packed = [one for one, info in facts.tensors.items() if _is_packed(one, info)]
    if packed:
        raise ModelError(
            f"{name} holds {_some(packed)} in {facts.tensors[packed[0]].dtype}, but config.json has"
            " no quantization_config: the numbers would be read without their scales; restore it"
        )
    _check_tie(facts, name)
    _check_rows(facts, name)
    try:
        model, found = _load_shapes(facts, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{name} cannot be loaded: {error}") from error
    except RuntimeError as error:
        raise ModelError(
            f"{name}: its tensors do not have the shapes of config.json, or experts are missing:"
            " copy or download both again"
        ) from error
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{name}: transformers makes no model of its config.json"
            f" ({type(error).__name__}: {error}); correct it"
        ) from error
    if found["missing_keys"]:
        raise ModelError(
            f"{name} lacks {_some(found['missing_keys'])}: they would start as random numbers; copy"
            " or download the weights again"
        )
    strange = [tensor for tensor in found["unexpected_keys"] if _belongs(tensor, model)]
    if strange:
        raise ModelError(
            f"{name} holds {_some(strange)}, for which the model of its config.json"
            f" ({facts.layers_key}: {facts.num_layers}) has no place: they would be left out;"
            " correct config.json, or use the weights that belong to it"
        )


def _belongs(tensor: str, model: nn.Module) -> bool:
    """Whether a tensor that the model has no place for would be a part of it.

    Heads beside the model (`v_head`, `mtp`) are not, nor are masks and frequencies of old versions.
    """
    first = tensor.partition(".")[0]
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, model) if prefix else model
    parts = {name for name, _ in (*model.named_children(), *backbone.named_children())}
    return first in parts and not tensor.endswith(_BUFFERS)


def _load_shapes(facts: ModelFacts, *, trust_remote_code: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model without memory for its parameters, and what its tensors and modules lack."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 (seconds)
    from transformers.utils import logging  # noqa: PLC0415

    # transformers prints a report of what does not fit; the message says it.
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(_SILENT)
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        return load(
            facts.path,
            device_map=torch.device("meta"),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_rows(facts: ModelFacts, name: str) -> None:
    for tensor, info in facts.tensors.items():
        embedding = tensor.endswith((*_EMBEDDING_SUFFIXES, "lm_head.weight"))
        if embedding and len(info.shape) == 2 and info.shape[0] != facts.num_rows:
            raise ModelError(
                f"{name}: vocab_size in config.json must be the rows of {tensor}, got"
                f" {facts.num_rows} and {info.shape[0]}; correct config.json"
            )


def _check_tie(facts: ModelFacts, name: str) -> None:
    if not facts.tied:
        return
    embedding = _first(facts, _EMBEDDING_SUFFIXES)
    head = _first(facts, ("lm_head.weight",))
    if embedding is None or head is None:
        return
    comparable = head.dtype == embedding.dtype
    if head.shape != embedding.shape or (comparable and _beginning(head) != _beginning(embedding)):
        raise ModelError(
            f"{name}: tie_word_embeddings must be false in config.json, got true: the weights hold"
            " an output head that is not the embedding, and it would be lost or not by the program"
            " that loads it; correct config.json"
        )


def _is_packed(name: str, info: TensorInfo) -> bool:
    return info.dtype in _PACKED_DTYPES and name.endswith("weight")


def _first(facts: ModelFacts, suffixes: tuple[str, ...]) -> TensorInfo | None:
    return next((info for name, info in facts.tensors.items() if name.endswith(suffixes)), None)


def _beginning(tensor: TensorInfo) -> bytes:
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        return stream.read(min(tensor.num_bytes, _COMPARED_BYTES))


def _some(names: Collection[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - _NUM_SHOWN
    return ", ".join(ordered[:_NUM_SHOWN]) + (f" and {more} more" if more > 0 else "")
