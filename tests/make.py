"""Builders for tests. A test states the values that it is about and leaves the rest to defaults.

Test actors import this module in their own processes, so torch, transformers and tokenizers are
imported inside the builders that need them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from distillm_ray.config import Config
from distillm_ray.types import (
    Demand,
    Draw,
    DrawnSequence,
    FinishReason,
    Mix,
    PlannedSequence,
    Prompt,
    Rollout,
    Shelf,
    Source,
    Weights,
)

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
"""Sizes of a tiny model, for the config of any Llama-like architecture."""


# ---- messages ------------------------------------------------------------------------------------


def prompt(
    name: str = "p",
    *,
    token_ids: ArrayLike = (1, 2),
    text: str = "",
    references: Sequence[str] = (),
) -> Prompt:
    """A prompt. The token ids of each reference are 5 and 9."""
    return Prompt(
        prompt_id=name,
        token_ids=np.asarray(token_ids, dtype=np.int32),
        reference_ids=tuple(np.array([5, 9], dtype=np.int32) for _ in references),
        text=text,
        references=tuple(references),
    )


def rollout(
    name: str = "r",
    *,
    prompt_id: str = "p",
    prompt: ArrayLike = (1, 2),
    response: ArrayLike = (5, 9),
    mask: ArrayLike | None = None,
    source: Source = Source.STUDENT,
    version: int = 0,
    finish: FinishReason = FinishReason.STOP,
    logprobs: ArrayLike | None = None,
    ordinal: int | None = None,
    text: str = "",
) -> Rollout:
    """A rollout. Without a mask, the loss covers every response token."""
    response_ids = np.asarray(response, dtype=np.int32)
    return Rollout(
        rollout_id=name,
        prompt_id=prompt_id,
        prompt_ids=np.asarray(prompt, dtype=np.int32),
        response_ids=response_ids,
        loss_mask=np.ones(len(response_ids), bool) if mask is None else np.asarray(mask, bool),
        source=source,
        version=version,
        finish_reason=finish,
        logprobs=None if logprobs is None else np.asarray(logprobs, dtype=np.float32),
        ordinal=ordinal,
        text=text,
    )


def demand(
    ordinal: int = 0,
    *,
    of: Prompt | None = None,
    min_version: int = 0,
    attempt: int = 0,
) -> Demand:
    """Demand for the prompt `of`, or for one whose id is `p` followed by the ordinal."""
    of = prompt(f"p{ordinal}") if of is None else of
    return Demand(
        ordinal=ordinal,
        prompt_id=of.prompt_id,
        prompt_ids=of.token_ids,
        min_version=min_version,
        attempt=attempt,
    )


def weights(version: int, *buckets: Any, nbytes: int = 0) -> Weights[Any]:
    """Published weights; most tests look at their version only."""
    return Weights(version=version, buckets=buckets, nbytes=nbytes)


def planned(
    rollout: Rollout,
    *,
    shelf: Shelf = Shelf.FRESH,
    age: int = 0,
    term_weights: Sequence[float] = (1.0,),
) -> PlannedSequence:
    """A planned sequence whose loss tokens all have the same weight in a term."""
    return PlannedSequence(
        rollout=rollout,
        shelf=shelf,
        age=age,
        term_weights=tuple(
            np.full(rollout.num_loss_tokens, weight, dtype=np.float32) for weight in term_weights
        ),
    )


def draw(rollouts: Sequence[Rollout], *, step: int = 0, phi: float = 0.5, psi: float = 0.5) -> Draw:
    """A draw of these rollouts: the student's are fresh, the teacher's from the data-set shelf."""
    shelf_of = {Source.STUDENT: Shelf.FRESH, Source.CORPUS: Shelf.CORPUS}
    shelves = [shelf_of.get(one.source, Shelf.DATASET) for one in rollouts]
    return Draw(
        step=step,
        phi=phi,
        psi=psi,
        mix=Mix(
            fresh=shelves.count(Shelf.FRESH),
            dataset=shelves.count(Shelf.DATASET),
            corpus=shelves.count(Shelf.CORPUS),
        ),
        sequences=tuple(
            DrawnSequence(rollout=one, shelf=shelf, age=0)
            for one, shelf in zip(rollouts, shelves, strict=True)
        ),
    )


# ---- config --------------------------------------------------------------------------------------


def tree(**sections: Any) -> dict[str, Any]:
    """The smallest valid config as a tree, with the keys of `sections` set in it."""
    values: dict[str, Any] = {
        "run": {"directory": "/runs/x"},
        "teacher": {"model": "/models/teacher"},
        "student": {"model": "/models/student"},
        "data": {"train": ["/data/train.jsonl"]},
        "learner": {"steps": 10, "batch_size": 8},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    return values


def config(**sections: Any) -> Config:
    """The smallest valid config with these keys, as in `config(learner={"steps": 4})`."""
    return Config.model_validate(tree(**sections))


# ---- models and tokenizers -----------------------------------------------------------------------


def llama_config(**settings: Any) -> LlamaConfig:
    """A tiny Llama of the sizes in `SMALL`, where `settings` does not name others."""
    from transformers import LlamaConfig

    return LlamaConfig(**(SMALL | settings))


def llama(*, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """A tiny Llama whose weights depend on the seed and its settings only."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(**settings))


def tokenizer(
    special: Sequence[str],
    words: Sequence[str],
    *,
    end: str = "</s>",
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """One id a word, the special tokens first. White space is dropped.

    Args:
        special: includes `<unk>` and the end token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token="<unk>")
    made.chat_template = chat_template
    return made


def byte_tokenizer(
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *,
    text_tokens: Sequence[str] = ("<think>", "</think>"),
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """One id a byte, then the special tokens, of which the first is eos, then the text tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={one: index for index, one in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    backend.add_tokens([AddedToken(token, special=False) for token in text_tokens])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])
    made.chat_template = chat_template
    return made
