"""Methods of distillation: names for settings of schedule, loss and rollouts. Plain data.

`method: NAME` in a config is the same as writing these keys out. Keys beside it win. No code asks
for the name; what a run does follows from its keys alone, and `distillm-ray show` prints them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

MethodName: TypeAlias = Literal[
    "sft", "kd", "seqkd", "imitkd", "gkd", "opd", "minillm", "distillm", "distillm2"
]

_DATASET_ONLY: Mapping[str, Any] = {"type": "fixed", "phi": 0.0}
_STUDENT_ONLY: Mapping[str, Any] = {"type": "fixed", "phi": 1.0, "replay_ratio": "none"}
# Every sample comes from the weights that it trains.
_STRICTLY_ON_POLICY: Mapping[str, Any] = {"lookahead": 1, "sync_interval": 1, "max_staleness": 0}

METHODS: Mapping[str, Mapping[str, Any]] = {
    # Supervised fine-tuning on the data set's responses.
    "sft": {
        "schedule": _DATASET_ONLY,
        "loss": {"terms": [{"on": "dataset", "type": "cross_entropy"}]},
    },
    # Word-level distillation on the data set's responses: Hinton et al., 2015; Sanh et al., 2019.
    "kd": {
        "schedule": _DATASET_ONLY,
        "loss": {"terms": [{"on": "dataset", "type": "forward_kl"}]},
    },
    # Sequence-level distillation: SFT on the teacher's responses. Kim and Rush, EMNLP 2016.
    "seqkd": {
        "data": {"responses": "teacher"},
        "schedule": _DATASET_ONLY,
        "loss": {"terms": [{"on": "teacher", "type": "cross_entropy"}]},
    },
    # On-policy imitation of the teacher: Lin et al., EMNLP 2020.
    "imitkd": {
        "schedule": _STUDENT_ONLY,
        "loss": {"terms": [{"on": "student", "type": "forward_kl"}]},
        "rollout": _STRICTLY_ON_POLICY,
    },
    # Generalized knowledge distillation: Agarwal et al., ICLR 2024. phi is the paper's lambda.
    "gkd": {
        "schedule": {"type": "fixed", "phi": 0.5, "replay_ratio": "none"},
        "loss": {"terms": [{"on": "all", "type": "jensen_shannon", "beta": 0.5}]},
        "rollout": _STRICTLY_ON_POLICY,
    },
    # On-policy distillation with the reverse KL, exact over the vocabulary.
    "opd": {
        "schedule": _STUDENT_ONLY,
        "loss": {"terms": [{"on": "student", "type": "reverse_kl"}]},
    },
    # The sequence-level reverse KL by policy gradient: Gu et al., ICLR 2024. The single-step part
    # is exact; the long part rewards a token with the mean of those after it. The paper's third
    # part, cross-entropy on a plain corpus, needs files: data.corpus and a term with on: corpus.
    "minillm": {
        "schedule": _STUDENT_ONLY,
        "loss": {
            "terms": [
                {"on": "student", "type": "reverse_kl", "max_importance": 1.2},
                {"on": "student", "type": "policy_gradient", "horizon": "rest", "clip": 0.2},
            ]
        },
    },
    # Skew KL, an adaptive share of student text, replay: Ko et al., ICML 2024.
    "distillm": {
        "schedule": {"type": "adaptive", "replay_ratio": "decreasing"},
        "loss": {"terms": [{"on": "all", "type": "skew_kl", "alpha": 0.1}]},
    },
    # Pairs of the teacher's and the student's response, with a divergence for each side: Ko et al.,
    # ICML 2025. The curriculum lowers alpha where the two are close, and moves weight from the
    # teacher's side to the student's over the first half of the run.
    "distillm2": {
        "data": {"responses": "teacher"},
        "schedule": {"type": "paired"},
        "loss": {
            "terms": [
                {
                    "on": "teacher",
                    "type": "skew_kl",
                    "alpha": 0.1,
                    "curriculum": True,
                    "final_weight": 0.5,
                },
                {
                    "on": "student",
                    "type": "skew_reverse_kl",
                    "alpha": 0.1,
                    "curriculum": True,
                    "final_weight": 1.5,
                },
            ]
        },
    },
}
