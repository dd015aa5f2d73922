"""ROUGE-L and BLEU of responses, over seeds. Pure: generation is passed in.

ROUGE-L as the paper's evaluation code takes it: F-measure with Porter stemming, the best of a
prompt's references, the mean over prompts, times 100.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from distillm_ray.types import FinishReason, Prompt, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """One set of responses, one a prompt."""

    rouge_l: float  # 0 to 100
    bleu: float  # 0 to 100, of the corpus
    num_prompts: int
    mean_response_tokens: float
    num_truncated: int  # ended by length


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over seeds: mean and sample standard deviation (0 with one seed)."""

    mean: float
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSummary:
    """All seeds together."""

    seeds: tuple[int, ...]
    rouge_l: Score
    bleu: Score
    num_prompts: int
    mean_response_tokens: float
    truncated_fraction: float


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over predictions of the best reference's ROUGE-L F-measure, 0 to 100.

    `references[i]` belongs to `predictions[i]`; see `rouge_l_scores`.
    """
    return statistics.fmean(rouge_l_scores(predictions, references))


def rouge_l_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[float, ...]:
    """ROUGE-L of each prediction, 0 to 100; 0 for an empty prediction.

    Raises:
        ValueError: nothing to score, unequal lengths, or a prediction without reference.
    """
    _check(predictions, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return tuple(
        100.0 * max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in answers)
        for prediction, answers in zip(predictions, references, strict=True)
    )


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU (sacrebleu's defaults), 0 to 100; prompts may have unequally many references.

    Raises:
        ValueError: see `rouge_l_scores`.
    """
    _check(predictions, references)
    num_streams = max(len(answers) for answers in references)
    # sacrebleu wants streams: the k-th reference of every prompt, None where a prompt has fewer
    streams: list[Any] = [
        [answers[k] if k < len(answers) else None for answers in references]
        for k in range(num_streams)
    ]
    return float(BLEU().corpus_score(list(predictions), streams).score)


def evaluate_responses(prompts: Sequence[Prompt], responses: Sequence[Rollout]) -> EvaluationResult:
    """Score `responses[i].text` against the references of `prompts[i]`.

    Raises:
        ValueError: unequal lengths, another prompt's response, or a prompt without reference.
    """
    for prompt, response in zip(prompts, responses, strict=True):
        if prompt.prompt_id != response.prompt_id:
            raise ValueError(
                f"responses must be in the prompts' order, got one for {response.prompt_id} in the"
                f" place of {prompt.prompt_id}"
            )
    texts = [response.text for response in responses]
    references = [prompt.references for prompt in prompts]
    return EvaluationResult(
        rouge_l=rouge_l(texts, references),
        bleu=bleu(texts, references),
        num_prompts=len(prompts),
        mean_response_tokens=statistics.fmean(len(r.response_ids) for r in responses),
        num_truncated=sum(r.finish_reason == FinishReason.LENGTH for r in responses),
    )


def summarize(results: dict[int, EvaluationResult]) -> EvaluationSummary:
    """Results by seed into mean and standard deviation.

    Raises:
        ValueError: no results, or results over different numbers of prompts.
    """
    if not results:
        raise ValueError("evaluation needs at least one seed, got none")
    sizes = {result.num_prompts for result in results.values()}
    if len(sizes) > 1:
        raise ValueError(f"all seeds must answer the same prompts, got {sorted(sizes)} prompts")
    (num_prompts,) = sizes
    values = list(results.values())
    return EvaluationSummary(
        seeds=tuple(results),
        rouge_l=_score([result.rouge_l for result in values]),
        bleu=_score([result.bleu for result in values]),
        num_prompts=num_prompts,
        mean_response_tokens=statistics.fmean(result.mean_response_tokens for result in values),
        truncated_fraction=statistics.fmean(
            result.num_truncated / result.num_prompts for result in values
        ),
    )


def _score(values: Sequence[float]) -> Score:
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
    bare = [index for index, answers in enumerate(references) if not answers]
    if bare:
        raise ValueError(f"prediction {bare[0]} has no reference to compare with")
