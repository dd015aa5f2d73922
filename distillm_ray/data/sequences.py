"""The prompts and demonstrations of a table, made of its rows when they are asked for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from distillm_ray.data.token_table import Block, RowNumbers, RowSequence, TokenTable
from distillm_ray.types import FinishReason, Prompt, Rollout, Source

ID_COLUMNS = (
    "prompt_id",
    "truncated",
    "prompt_ids",
    "reference_ids",
    "demonstration_prompt_ids",
    "demonstration_response_ids",
    "demonstration_loss_mask",
)
TEXT_COLUMNS = ("text", "references", "columns")


class Prompts(RowSequence[Prompt]):
    """Without `TEXT_COLUMNS` in their table, prompts have no texts."""

    def _make(self, block: Block, row: int) -> Prompt:
        return Prompt(
            prompt_id=block.text("prompt_id", row),
            token_ids=block.ids("prompt_ids", row),
            reference_ids=block.several_ids("reference_ids", row),
            text=block.text("text", row),
            references=block.texts("references", row),
        )

    @property
    def num_tokens(self) -> int:
        """Of all prompts."""
        return int(self.table.lengths("prompt_ids")[self.rows].sum())

    @property
    def num_without_reference(self) -> int:
        """How many of them the data set has no response for."""
        return int(np.count_nonzero(self.table.first_lengths("reference_ids")[self.rows] < 0))


class Demonstrations(RowSequence[Rollout]):
    """The data set's response to each prompt, as it is learned.

    Where the demonstration's own columns are empty it is the prompt with its first reference.
    """

    def __init__(self, table: TokenTable, rows: RowNumbers, source: Source) -> None:
        super().__init__(table, rows)
        self.source = source

    def _make(self, block: Block, row: int) -> Rollout:
        prompt_id = block.text("prompt_id", row)
        prompt_ids = block.ids("demonstration_prompt_ids", row)
        if len(prompt_ids):
            response_ids = block.ids("demonstration_response_ids", row)
            loss_mask = block.lists("demonstration_loss_mask")[row]
        else:
            prompt_ids = block.ids("prompt_ids", row)
            response_ids = block.first_ids("reference_ids", row)
            loss_mask = np.ones(len(response_ids), dtype=np.bool_)
        texts = block.texts("references", row)
        return Rollout(
            rollout_id=f"{self.source}-{prompt_id}",
            prompt_id=prompt_id,
            prompt_ids=prompt_ids,
            response_ids=response_ids,
            loss_mask=loss_mask,
            source=self.source,
            version=0,
            finish_reason=(
                FinishReason.LENGTH if block.value("truncated", row) else FinishReason.STOP
            ),
            text=texts[0] if texts else "",
        )

    @property
    def num_response_tokens(self) -> int:
        """Of all demonstrations."""
        return int(response_lengths(self.table)[self.rows].sum())


class OwnColumns(RowSequence[dict[str, Any]]):
    """Each row's own prompt in the columns that it came in."""

    def _make(self, block: Block, row: int) -> dict[str, Any]:
        return json.loads(block.text("columns", row))


def response_lengths(table: TokenTable) -> RowNumbers:
    """How many tokens the demonstration of each row learns from; not positive without one."""
    is_own = table.lengths("demonstration_prompt_ids") > 0
    own = table.lengths("demonstration_response_ids")
    return np.where(is_own, own, table.first_lengths("reference_ids"))
