"""ROUGE-L and BLEU against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distillm_ray.evaluation.scores import (
    EvaluationResult,
    bleu,
    evaluate_responses,
    rouge_l,
    summarize,
)
from distillm_ray.types import FinishReason, Prompt, Rollout, Source


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


def test_bleu_punishes_short_predictions() -> None:
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


def a_prompt(name: str, *references: str) -> Prompt:
    ids = np.array([1], np.int32)
    return Prompt(
        prompt_id=name, token_ids=ids, reference_ids=(ids,), text=name, references=references
    )


def a_response(name: str, text: str, num_tokens: int, reason: FinishReason) -> Rollout:
    return Rollout(
        rollout_id=f"r-{name}",
        prompt_id=name,
        prompt_ids=np.array([1], np.int32),
        response_ids=np.ones(num_tokens, np.int32),
        loss_mask=np.ones(num_tokens, np.bool_),
        source=Source.STUDENT,
        version=0,
        finish_reason=reason,
        text=text,
    )


def test_responses_are_scored_against_their_own_prompts_references() -> None:
    prompts = [a_prompt("a", "blue sky"), a_prompt("b", "green grass")]
    responses = [
        a_response("a", "blue sky", 3, FinishReason.STOP),
        a_response("b", "red", 8, FinishReason.LENGTH),
    ]
    result = evaluate_responses(prompts, responses)
    assert result.rouge_l == pytest.approx(50.0)
    assert (result.num_prompts, result.num_truncated) == (2, 1)
    assert result.mean_response_tokens == 5.5
    with pytest.raises(ValueError, match="one for b in the place of a"):
        evaluate_responses(prompts, responses[::-1])


def test_seeds_are_summarized_by_mean_and_sample_deviation() -> None:
    def result(rouge: float, truncated: int) -> EvaluationResult:
        return EvaluationResult(
            rouge_l=rouge,
            bleu=1.0,
            num_prompts=4,
            mean_response_tokens=10.0,
            num_truncated=truncated,
        )

    summary = summarize({10: result(20.0, 0), 20: result(22.0, 2), 30: result(27.0, 1)})
    assert summary.seeds == (10, 20, 30)
    assert summary.rouge_l.mean == pytest.approx(23.0)
    assert summary.rouge_l.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert summary.bleu.std == 0.0
    assert summary.truncated_fraction == pytest.approx(0.25)
    assert summarize({10: result(20.0, 0)}).rouge_l.std == 0.0
