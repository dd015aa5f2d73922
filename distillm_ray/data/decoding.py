"""Token ids as text: for people, for comparison, and for rows of data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distillm_ray.types import FinishReason, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def decode(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """The response as people read it: without special tokens and surrounding space."""
    text = tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()


def decode_ids(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """All that ids say, special tokens included."""
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert isinstance(text, str)
    return text


def spoken(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """The response as a row of data has to hold it: every character after the prompt.

    Decoded after its prompt, because some tokenizers drop the space before the first word.
    """
    ids = rollout.response_ids.tolist()
    if rollout.finish_reason is FinishReason.STOP:
        ids = ids[:-1]
    prompt = rollout.prompt_ids.tolist()
    before, whole = decode_ids(tokenizer, prompt), decode_ids(tokenizer, [*prompt, *ids])
    return whole[len(before) :] if whole.startswith(before) else decode_ids(tokenizer, ids)
