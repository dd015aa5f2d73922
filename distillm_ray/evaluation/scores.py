"""How good responses are, compared with references. Pure: the responses are passed in.

ROUGE follows the evaluation code of the DistiLLM paper: F-measures with Porter stemming, the best
over a prompt's references, the mean over prompts, times 100. `SCORES` names all metrics.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from distillm_ray.evaluation.results import ModelScores, Score
from distillm_ray.types import FinishReason, Prompt, Rollout

NUM_RESAMPLES = 1000
_COVERAGE = (2.5, 97.5)  # percentiles of an interval
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def score_responses(prompts: Sequence[Prompt], by_seed: Sequence[Sequence[Rollout]]) -> ModelScores:
    """All scores over sampling seeds; the validation loss stays NaN.

    The `text` of `by_seed[s][i]` is compared with the references of `prompts[i]`.

    Raises:
        ValueError: no seeds, unequal lengths, a response to another prompt, or a prompt without
            reference.
    """
    for responses in by_seed:
        for prompt, response in zip(prompts, responses, strict=True):
            if prompt.prompt_id != response.prompt_id:
                raise ValueError(
                    f"responses must be in the prompts' order, got one for {response.prompt_id} in"
                    f" the place of {prompt.prompt_id}"
                )
    texts = [[response.text for response in responses] for responses in by_seed]
    references = [prompt.references for prompt in prompts]
    rouges = [rouge(predictions, references) for predictions in texts]
    return ModelScores(
        rouge_1=over_prompts([one["rouge_1"] for one in rouges]),
        rouge_2=over_prompts([one["rouge_2"] for one in rouges]),
        rouge_l=over_prompts([one["rouge_l"] for one in rouges]),
        bleu=mean_and_deviation([bleu(predictions, references) for predictions in texts]),
        exact_match=over_prompts([exact_match(one, references) for one in texts]),
        number_match=over_prompts([number_match(one, references) for one in texts])
        if all(last_number(choice) is not None for choices in references for choice in choices)
        else None,
        response_tokens=over_prompts(
            [np.array([len(one.response_ids) for one in seed], float) for seed in by_seed]
        ),
        truncated=over_prompts(
            [
                np.array([100.0 * (one.finish_reason is FinishReason.LENGTH) for one in seed])
                for seed in by_seed
            ]
        ),
    )


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


def over_prompts(by_seed: Sequence[NDArray[np.float64]]) -> Score:
    """A metric that each prompt has, `[N]` for each seed: with an interval over prompts.

    The interval is the percentile bootstrap: prompts are drawn again, their seeds stay together.

    Raises:
        ValueError: no values.
    """
    score = mean_and_deviation([float(values.mean()) for values in by_seed])
    values_N = np.mean(by_seed, axis=0)
    numbers = np.random.default_rng(0)
    means = [
        values_N[numbers.integers(len(values_N), size=len(values_N))].mean()
        for _ in range(NUM_RESAMPLES)
    ]
    low, high = np.percentile(means, _COVERAGE)
    return Score(mean=score.mean, std=score.std, low=float(low), high=float(high))


def mean_and_deviation(values: Sequence[float]) -> Score:
    """Mean and sample standard deviation of a metric's values, one for each seed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("evaluation needs at least one seed, got none")
    return Score(
        mean=statistics.fmean(values),
        std=statistics.stdev(values) if len(values) > 1 else 0.0,
    )


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
