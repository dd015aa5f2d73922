"""Scores of responses against values computed by hand and against their libraries."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from distillm_ray.evaluation.responses_file import write_responses
from distillm_ray.evaluation.results import Score
from distillm_ray.evaluation.scores import mean_and_deviation, over_prompts, score_responses
from distillm_ray.text_metrics import bleu, exact_match, number_match, rouge
from distillm_ray.types import FinishReason, Rollout
from tests import make


def rouge_l(predictions: list[str], references: list[list[str]]) -> float:
    return float(rouge(predictions, references)["rouge_l"].mean())


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


# ---- more scores ---------------------------------------------------------------------------------

PREDICTIONS = ["The cats sat on a mat.", "Rain falls in 1,200 drops", "", "four"]
REFERENCES = [
    ["A cat sits on the mat", "The cat sat."],
    ["It rains 1200 drops"],
    ["nothing"],
    ["four"],
]


def test_rouge_agrees_with_its_library_reference_by_reference() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    found = rouge(PREDICTIONS, REFERENCES)
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        expected = [
            max(100 * scorer.score(one, prediction)[key].fmeasure for one in choices)
            for prediction, choices in zip(PREDICTIONS, REFERENCES, strict=True)
        ]
        assert found[name].tolist() == pytest.approx(expected)
        assert 0 < found[name].mean() < 100


def test_bleu_agrees_with_its_library() -> None:
    single = [choices[0] for choices in REFERENCES]
    expected = sacrebleu.corpus_bleu(PREDICTIONS, [single]).score
    assert bleu(PREDICTIONS, [[one] for one in single]) == pytest.approx(expected)


def test_an_exact_match_ignores_white_space_only() -> None:
    found = exact_match(["a  b\n", "A b", "b"], [["a b"], ["a b"], ["a", "b"]])
    assert found.tolist() == [100.0, 0.0, 100.0]


@pytest.mark.parametrize(
    ("prediction", "reference", "equal"),
    [
        ("3 + 4 = 7", "#### 7", True),
        ("the answer is 1,007.0.", "1007", True),
        ("-3", "3", False),
        ("seven", "7", False),
        ("first 7, then 8", "7", False),
        ("1,2", "12", False),
    ],
)
def test_the_last_number_of_a_response_is_its_answer(
    prediction: str, reference: str, equal: bool
) -> None:
    assert number_match([prediction], [[reference]]).tolist() == [100.0 * equal]


def test_numbers_are_compared_only_where_every_reference_has_one() -> None:
    prompts = [make.prompt("a", references=("it is 7",)), make.prompt("b", references=("8",))]
    answers = [response("a", "7"), response("b", "9")]
    found = score_responses(prompts, [answers])
    assert found.number_match is not None and found.number_match.mean == 50.0
    bare = [*prompts, make.prompt("c", references=("none",))]
    assert score_responses(bare, [[*answers, response("c", "7")]]).number_match is None


def test_an_interval_narrows_with_prompts_and_knows_no_spread_of_equal_ones() -> None:
    few, many = (np.tile([0.0, 100.0], count) for count in (5, 500))
    wide, narrow = over_prompts([few]), over_prompts([many])
    assert wide.low is not None and wide.high is not None
    assert narrow.low is not None and narrow.high is not None
    assert wide.low < narrow.low < 50.0 < narrow.high < wide.high
    # The standard error of 1,000 fair coins is 1.58: 95 % within 3.1.
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * 1.58, rel=0.15)
    same = over_prompts([np.full(9, 40.0), np.full(9, 60.0)])
    assert (same.mean, same.low, same.high) == (50.0, 50.0, 50.0)
    assert same.std == pytest.approx(14.142, rel=1e-3)


def test_length_and_truncation_are_told() -> None:
    prompts = [make.prompt("a", references=("x",)), make.prompt("b", references=("y",))]
    long = make.rollout(prompt_id="b", response=[5] * 7, finish=FinishReason.LENGTH, text="z z z")
    found = score_responses(prompts, [[response("a", "x"), long]])
    assert found.response_tokens is not None and found.response_tokens.mean == (2 + 7) / 2
    assert found.truncated is not None and found.truncated.mean == 50.0


def test_the_responses_are_kept_with_their_scores(tmp_path: Path) -> None:
    prompts = [make.prompt("a", text="why", references=("blue sky",))]
    path = tmp_path / "new" / "file.jsonl"
    write_responses(path, prompts, [[response("a", "blue sky")], [response("a", "red")]], [10, 20])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["seed"], row["rouge_l"], row["exact_match"]) for row in rows] == [
        (10, 100.0, True),
        (20, 0.0, False),
    ]
    assert rows[0] | {"seed": 0, "rouge_l": 0, "exact_match": 0} == {
        "id": "a",
        "seed": 0,
        "prompt": "why",
        "response": "blue sky",
        "references": ["blue sky"],
        "finish_reason": "stop",
        "tokens": 2,
        "rouge_l": 0,
        "exact_match": 0,
    }
