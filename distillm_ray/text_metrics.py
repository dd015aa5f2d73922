"""Metrics of texts against references, prediction by prediction. Pure, and without a model.

ROUGE follows the evaluation code of the DistiLLM paper: F-measures with Porter stemming, the best
over a prompt's references, times 100.

Axes: N predictions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, NDArray[np.float64]]:
    """ROUGE-1, -2 and -L of each prediction, `[N]`, 0 to 100; the best reference of each.

    `references[i]` belongs to `predictions[i]`. An empty prediction scores 0.

    Raises:
        ValueError: no predictions, unequal lengths, or a prediction without reference.
    """
    _check(predictions, references)
    scorer = RougeScorer(list(_ROUGE.values()), use_stemmer=True)
    found: dict[str, list[float]] = {name: [] for name in _ROUGE}
    for prediction, choices in zip(predictions, references, strict=True):
        scores = [scorer.score(reference, prediction) for reference in choices]
        for name, key in _ROUGE.items():
            found[name].append(100.0 * max(score[key].fmeasure for score in scores))
    return {name: np.array(values) for name, values in found.items()}


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """100 for each prediction that is one of its references but for white space, else 0; `[N]`."""
    _check(predictions, references)
    return np.array(
        [
            100.0 * (prediction.split() in [choice.split() for choice in choices])
            for prediction, choices in zip(predictions, references, strict=True)
        ]
    )


def number_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> NDArray[np.float64]:
    """100 for each prediction whose last number is the last number of a reference, else 0; `[N]`.

    For tasks with one right answer, as GSM8K.
    """
    _check(predictions, references)
    return np.array(
        [
            100.0
            * (
                (number := last_number(prediction)) is not None
                and number in [last_number(choice) for choice in choices]
            )
            for prediction, choices in zip(predictions, references, strict=True)
        ]
    )


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None without one.

    Example:
        >>> last_number("3 + 4 = 7, so the answer is 1,007.50.")
        Decimal('1007.50')
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU with sacrebleu's defaults, 0 to 100. Prompts may differ in number of references.

    Raises:
        ValueError: as `rouge`.
    """
    _check(predictions, references)
    num_streams = max(len(choices) for choices in references)
    # sacrebleu takes streams: the k-th reference of each prompt, None where a prompt has fewer.
    streams: list[Any] = [  # Any: sacrebleu's annotation lacks the None
        [choices[k] if k < len(choices) else None for choices in references]
        for k in range(num_streams)
    ]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(predictions) != len(references):
        raise ValueError(
            f"every prediction needs its references, got {len(predictions)} predictions and"
            f" {len(references)} lists of references"
        )
    if not predictions:
        raise ValueError("there is nothing to score: no predictions")
    bare = [index for index, choices in enumerate(references) if not choices]
    if bare:
        raise ValueError(f"prediction {bare[0]} has no reference to compare with")
