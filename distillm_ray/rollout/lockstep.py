"""A teacher that follows a batch of the student's generate(), token by token.

    generate() of the student ── token ids so far, logits ──► log q ──┐
                                      │                               ├──► log (m p + (1 - m) q)
                                      └──► teacher, own cache ──► log p ┘

MiniLLM (Gu et al., ICLR 2024, section 2.2) samples every token from the mixture. No token is
proposed and checked: both models see the same prefix, so the log-probability of a token is exact.

Axes: B batch, P padded prompt, L padded prompt and the response so far, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


class Lockstep:
    """Next-token log-probabilities of a second model for one batch that grows by a token a call."""

    def __init__(self, model: PreTrainedModel, mask_BP: Tensor, vocabulary_size: int) -> None:
        """`mask_BP` is 0 at the padding of the prompts, which are padded on the left."""
        self._model = model
        self._mask_BP = mask_BP
        self._vocabulary_size = vocabulary_size
        self._cache: Any = None  # transformers has a class for each kind of model

    def log_probs(self, token_ids_BL: Tensor) -> Tensor:
        """`[B, V]`, float32, of the token after `token_ids_BL`.

        Every call brings the ids of the call before and one more in each row.
        """
        num_rows, length = token_ids_BL.shape
        new_mask = self._mask_BP.new_ones(num_rows, length - self._mask_BP.shape[1])
        settings = {} if self._cache is None else {"past_key_values": self._cache}
        # One token of generate(), which prepares positions, masks and cache as each model wants
        # them, and computes only what the cache does not hold.
        output = cast(Any, self._model).generate(
            inputs=token_ids_BL,
            attention_mask=torch.cat([self._mask_BP, new_mask], dim=1),
            generation_config=GenerationConfig(
                max_new_tokens=1,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            ),
            **settings,
        )
        self._cache = output.past_key_values
        return next_log_probs(output.logits[0], self._vocabulary_size)


def next_log_probs(logits: Tensor, vocabulary_size: int) -> Tensor:
    """`[B, vocabulary_size]`, float32: ids beyond the vocabulary are impossible."""
    return logits[:, :vocabulary_size].float().log_softmax(dim=-1)


def mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log (share p + (1 - share) q), elementwise.

    Example:
        >>> halves = mixture(torch.tensor([0.5, 0.0]).log(), torch.tensor([0.1, 0.4]).log(), 0.5)
        >>> [round(one, 6) for one in halves.exp().tolist()]
        [0.3, 0.2]
    """
    log_p_share, log_q_share = torch.tensor([share, 1.0 - share], dtype=torch.float64).log()
    return torch.logaddexp(log_p + log_p_share.item(), log_q + log_q_share.item())
