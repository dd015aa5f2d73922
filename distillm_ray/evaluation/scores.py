"""ROUGE-L and BLEU of responses. Pure: the responses are passed in.

ROUGE-L follows the evaluation code of the DistiLLM paper: the F-measure with Porter stemming, the
best over a prompt's references, the mean over prompts, times 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from distillm_ray.evaluation.results import ModelScores, Score
from distillm_ray.types import Prompt, Rollout


def score_responses(prompts: Sequence[Prompt], by_seed: Sequence[Sequence[Rollout]]) -> ModelScores:
    """ROUGE-L and BLEU over sampling seeds; the validation loss stays NaN.

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
    return ModelScores(
        rouge_l=mean_and_deviation([rouge_l(predictions, references) for predictions in texts]),
        bleu=mean_and_deviation([bleu(predictions, references) for predictions in texts]),
    )


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over predictions of the best reference's ROUGE-L F-measure, 0 to 100.

    `references[i]` belongs to `predictions[i]`. An empty prediction scores 0.

    Raises:
        ValueError: no predictions, unequal lengths, or a prediction without reference.
    """
    _check(predictions, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return 100.0 * statistics.fmean(
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in choices)
        for prediction, choices in zip(predictions, references, strict=True)
    )


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU with sacrebleu's defaults, 0 to 100. Prompts may differ in number of references.

    Raises:
        ValueError: as `rouge_l`.
    """
    _check(predictions, references)
    num_streams = max(len(choices) for choices in references)
    # sacrebleu takes streams: the k-th reference of each prompt, None where a prompt has fewer.
    streams: list[Any] = [  # Any: sacrebleu's annotation lacks the None
        [choices[k] if k < len(choices) else None for choices in references]
        for k in range(num_streams)
    ]
    return float(BLEU().corpus_score(list(predictions), streams).score)


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
