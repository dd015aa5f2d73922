"""How good a model's responses are, over prompts and seeds. Pure: the responses are passed in."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distillm_ray.evaluation.results import ModelScores, Score
from distillm_ray.text_metrics import bleu, exact_match, last_number, number_match, rouge
from distillm_ray.types import FinishReason, Prompt, Rollout

NUM_RESAMPLES = 1000
_COVERAGE = (2.5, 97.5)  # percentiles of an interval


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
