"""Shows rows of data as the models see them: text, token ids, and what the loss covers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_ray.data.corpus import Corpus
from distillm_ray.data.splits import Splits
from distillm_ray.files import write_atomically
from distillm_ray.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_ROWS = 3  # that are shown
ROWS_FILE = "rows.txt"
_MAX_IDS = 24  # of a span; the middle of a longer one is left out
_MAX_CHARACTERS = 400  # likewise


def describe_rows(
    rows: Sequence[Rollout] | Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
) -> str:
    """Every sequence as a list of spans, each either context or under the loss.

    Example output::

        q0: 9 tokens, 4 under the loss
          context  '<user> add 2 and 2 <end> <assistant>'
                   1 14 5 9 5 3 2
          loss     'four <end>'
                   7 3
                   ends with 3 '<end>', an end token
    """
    return "\n".join(_describe(one, tokenizer, end_token_ids) for one in rows)


def describe_pieces(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> str:
    """The first pieces of the corpus, likewise. A document that goes on in the next has no end."""
    return describe_rows(corpus.pieces[:NUM_ROWS], tokenizer, (corpus.end_token_id,))


def write_first_rows(
    directory: Path,
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Collection[int],
) -> list[str]:
    """Write the first rows of a run's data to a file; returns the first of them, for the screen."""
    rows = splits.train.rows
    first = rows[:NUM_ROWS]
    path = directory / ROWS_FILE
    text = describe_rows(first, tokenizer, end_token_ids)
    if splits.corpus is not None:
        text += f"\n\n{describe_pieces(splits.corpus, tokenizer)}"
    write_atomically(path, f"{text}\n".encode())
    head = f"the first of {len(rows)} rows, as the models see it (more in {path}):"
    return [head, *describe_rows(first[:1], tokenizer, end_token_ids).splitlines()]


def _describe(
    row: Rollout | Prompt, tokenizer: PreTrainedTokenizerBase, end_token_ids: Collection[int]
) -> str:
    if isinstance(row, Prompt):
        ids = row.token_ids.tolist()
        learned = [False] * len(ids)
    else:
        ids = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
        learned = [False] * len(row.prompt_ids) + row.loss_mask.tolist()
    lines = [f"{row.prompt_id}: {len(ids)} tokens, {sum(learned)} under the loss"]
    for in_loss, group in itertools.groupby(zip(learned, ids, strict=True), key=lambda one: one[0]):
        span = [index for _, index in group]
        text = str(tokenizer.decode(span, skip_special_tokens=False))
        lines.append(f"  {'loss' if in_loss else 'context':<8} {_shortened(text)!r}")
        lines.append(f"           {_numbers(span)}")
        if in_loss:
            last = span[-1]
            what = "an end token" if last in end_token_ids else "NO end token"
            token = tokenizer.convert_ids_to_tokens(last)
            lines.append(f"           ends with {last} {token!r}, {what}")
    return "\n".join(lines)


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    half = _MAX_CHARACTERS // 2
    return f"{text[:half]} […] {text[-half:]}"


def _numbers(ids: Sequence[int]) -> str:
    if len(ids) <= _MAX_IDS:
        return " ".join(map(str, ids))
    half = _MAX_IDS // 2
    left_out = len(ids) - 2 * half
    shown = [*map(str, ids[:half]), f"[… {left_out} more …]", *map(str, ids[-half:])]
    return " ".join(shown)
