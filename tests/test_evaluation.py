"""ROUGE-L and BLEU against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distillm_ray.evaluation.results import Score
from distillm_ray.evaluation.scores import bleu, mean_and_deviation, rouge_l, score_responses
from distillm_ray.types import Rollout
from tests import make


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence() -> None:
    # common subsequence "the cat mat": 3 of 4 predicted and 3 of 6 reference words
    precision, recall = 3 / 4, 3 / 6
    expected = 100 * 2 * precision * recall / (precision + recall)
    assert rouge_l(["the cat a mat"], [["the cat sat on the mat"]]) == pytest.approx(expected)


def test_rouge_l_stems_words_and_ignores_case() -> None:
    assert rouge_l(["Cats RUNNING"], [["cat runs"]]) == pytest.approx(100.0)


def test_rouge_l_takes_the_best_reference_of_each_prediction_and_the_mean_over_them() -> None:
    value = rouge_l(["blue sky", "zero"], [["nothing alike", "blue sky"], ["other words"]])
    assert value == pytest.approx((100.0 + 0.0) / 2)


def test_an_empty_prediction_scores_zero() -> None:
    assert rouge_l([""], [["something"]]) == 0.0
    assert bleu([""], [["something"]]) == 0.0


def test_bleu_is_the_geometric_mean_of_the_n_gram_precisions_of_the_corpus() -> None:
    # 6 words, 5 right; bigrams 4 of 5, trigrams 3 of 4, four-grams 2 of 3; equal length
    expected = 100 * math.exp(np.mean(np.log([5 / 6, 4 / 5, 3 / 4, 2 / 3])))
    value = bleu(["a b c d e x"], [["a b c d e f"]])
    assert value == pytest.approx(expected)


def test_bleu_penalizes_short_predictions() -> None:
    # every n-gram is right, but 4 words for 6
    assert bleu(["a b c d"], [["a b c d e f"]]) == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_bleu_accepts_unequally_many_references() -> None:
    predictions = ["a b c d e", "k l m n o"]
    assert bleu(predictions, [["x y", "a b c d e"], ["k l m n o"]]) == pytest.approx(100.0)


def test_a_prediction_without_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction 1 has no reference"):
        rouge_l(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="nothing to score"):
        rouge_l([], [])


def response(prompt_id: str, text: str) -> Rollout:
    return make.rollout(f"r-{prompt_id}", prompt_id=prompt_id, text=text)


def test_responses_are_scored_against_their_own_prompts_references_seed_by_seed() -> None:
    prompts = [
        make.prompt("a", references=("blue sky",)),
        make.prompt("b", references=("green grass",)),
    ]
    half = [response("a", "blue sky"), response("b", "red")]
    full = [response("a", "blue sky"), response("b", "green grass")]
    scores = score_responses(prompts, [half, full])
    assert scores.rouge_l is not None and scores.bleu is not None
    assert scores.rouge_l.mean == pytest.approx(75.0)
    assert scores.rouge_l.std == pytest.approx(25 * math.sqrt(2))
    texts = [["blue sky", "red"], ["blue sky", "green grass"]]
    references = [["blue sky"], ["green grass"]]
    assert scores.bleu.mean == pytest.approx(np.mean([bleu(text, references) for text in texts]))
    assert math.isnan(scores.validation_loss)
    with pytest.raises(ValueError, match="one for b in the place of a"):
        score_responses(prompts, [half[::-1]])


def test_values_over_seeds_become_mean_and_sample_deviation() -> None:
    score = mean_and_deviation([20.0, 22.0, 27.0])
    assert score.mean == pytest.approx(23.0)
    assert score.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert mean_and_deviation([20.0]) == Score(mean=20.0, std=0.0)
    with pytest.raises(ValueError, match="at least one seed, got none"):
        mean_and_deviation([])
