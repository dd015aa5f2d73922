"""The messages between roles: who makes each of them, and who reads it. Read this file first.

    data ── Prompt ──► orchestrator ── Demand ──► Generator ── Rollout ──► Scorer ── TeacherTargets
      └──── Rollout (source = dataset) ─────────────┐  │                                 │
                                                    ▼  ▼                                 ▼
                          Schedule ── Mix ──► ReplayBuffer ── StepPlan ──► batching ◄─ TargetStore
                             ▲                                                │
                             └── Validation ◄── learner ◄── LearnerBatch ◄────┘
                                                   └────── Weights ──► Generator

Messages are immutable and hold numpy arrays, which cross process borders without a copy. Arrays
from the object store are read-only: copy before writing.

Axes: P prompt tokens, T response tokens, D hidden size, K top-k, V vocabulary, L packed tokens,
N loss positions of a packed row, S sequences of a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Int32Array: TypeAlias = NDArray[np.int32]
Float32Array: TypeAlias = NDArray[np.float32]
BoolArray: TypeAlias = NDArray[np.bool_]
Device: TypeAlias = Literal["cuda", "cpu"]


class Source(StrEnum):
    """Who wrote a response."""

    DATASET = "dataset"
    STUDENT = "student"
    TEACHER = "teacher"
    CORPUS = "corpus"  # nobody responded: plain text, whose first token stands for the prompt


class Shelf(StrEnum):
    """Where a sequence of the global batch comes from. Slots take from all but the corpus."""

    DATASET = "dataset"
    FRESH = "fresh"
    REPLAY = "replay"
    CORPUS = "corpus"


class FinishReason(StrEnum):
    """Why a response ended. `STOP`: an end token, which is then the last token of the response."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """Something to respond to, with the responses that the data set has for it."""

    prompt_id: str
    token_ids: Int32Array  # [P], chat template applied, ready for generation
    reference_ids: tuple[Int32Array, ...]  # each [T], end token included
    text: str  # the user's words, for reports
    references: tuple[str, ...]  # the same responses as text, for ROUGE and BLEU


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One prompt with one response: the unit that is generated, scored, stored and trained on."""

    rollout_id: str
    prompt_id: str
    prompt_ids: Int32Array  # [P]
    response_ids: Int32Array  # [T], T >= 1; ends with the end token if finish_reason is STOP
    loss_mask: BoolArray  # [T]; False where another speaker writes (multi-turn data)
    source: Source
    version: int  # optimizer step of the weights its generation started with; 0 for data
    finish_reason: FinishReason
    # [T], of the distribution that the tokens were sampled from, at temperature 1: the engine's
    # weights, mixed with the teacher where rollout.teacher_mix says so.
    logprobs: Float32Array | None = None
    ordinal: int | None = None  # of the demand that it fulfils; set on student rollouts
    text: str = ""  # the decoded response, where known; for reports

    def __post_init__(self) -> None:
        """Reject shapes that would only fail much later, inside a packed batch."""
        num_tokens = len(self.response_ids)
        assert num_tokens > 0, f"{self.rollout_id}: a rollout needs at least one response token"
        assert len(self.prompt_ids) > 0, f"{self.rollout_id}: a rollout needs a prompt token"
        assert self.loss_mask.shape == (num_tokens,), f"{self.rollout_id}: loss_mask is not [T]"
        assert self.logprobs is None or self.logprobs.shape == (num_tokens,)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens: what one forward pass of this sequence computes."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_loss_tokens(self) -> int:
        """Response tokens that the loss covers."""
        return int(self.loss_mask.sum())

    @property
    def loss_positions(self) -> Int32Array:
        """Positions of the sequence that predict its loss tokens, `[num_loss_tokens]`.

        Token i of the response is predicted one position before it: len(prompt) - 1 + i.
        """
        offsets = np.flatnonzero(self.loss_mask)
        return (len(self.prompt_ids) - 1 + offsets).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingData:
    """What a run draws from. Prompts and demonstrations may lack their texts."""

    prompts: Sequence[Prompt]
    demonstrations: Sequence[Rollout]
    corpus: Sequence[Rollout] = ()


# ---- teacher targets: row i belongs to the position that predicts the i-th loss token --------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class HiddenTargets:
    """The direct input of the teacher's output head: exact, full vocabulary, D values a token."""

    values_TD: NDArray[Any]  # uint16 (bfloat16 bits) or float32

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return self.values_TD.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TopKTargets:
    """The K most likely ids with their log-probabilities; the rest is one tail bucket."""

    ids_TK: Int32Array
    log_probs_TK: Float32Array

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return self.ids_TK.nbytes + self.log_probs_TK.nbytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LogitTargets:
    """All logits: for tests and tiny vocabularies."""

    values_TV: NDArray[Any]  # uint16 (bfloat16 bits) or float32

    @property
    def nbytes(self) -> int:
        """Size of the payload in bytes."""
        return self.values_TV.nbytes


TeacherTargets: TypeAlias = HiddenTargets | TopKTargets | LogitTargets
"""`[num_loss_tokens, ...]`: only the positions that predict response tokens under the loss mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReport:
    """What the orchestrator is told of a scored sequence; the payload goes to a store."""

    num_tokens: int  # tokens that the teacher's forward pass computed for this sequence
    nbytes: int  # size of the payload
    seconds: float = 0.0  # of the scorer, its share of the forward pass


# ---- demand and draw ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """A fresh student rollout that a coming step will train on.

    It has of its `Prompt` what a generator needs; texts and references stay with the data.
    """

    ordinal: int
    prompt_id: str
    prompt_ids: Int32Array  # [P]
    min_version: int  # the generation must start with these weights or newer ones
    attempt: int = 0  # how often the ordinal was lost before


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How many sequences of a global batch came from where."""

    fresh: int = 0
    replay: int = 0
    dataset: int = 0
    corpus: int = 0  # besides the slots

    @property
    def responses(self) -> int:
        """Sequences that the slots took: responses to prompts."""
        return self.fresh + self.replay + self.dataset

    @property
    def total(self) -> int:
        """Sequences of the global batch."""
        return self.responses + self.corpus


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DrawnSequence:
    """The sequence in one slot of the global batch, or one that the corpus adds to it."""

    rollout: Rollout
    shelf: Shelf
    age: int  # training step minus the version its generation started with; 0 for data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Draw:
    """The global batch of one step in slot order, then the corpus, before the split over ranks."""

    step: int
    phi: float
    psi: float
    mix: Mix
    sequences: tuple[DrawnSequence, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlannedSequence:
    """A drawn sequence with the weights of its loss tokens in each term of the loss.

    A filler repeats a sequence of the batch so that its rank has a row to compute. All of its
    weights are 0, and it does not count in any statistic.
    """

    rollout: Rollout
    shelf: Shelf
    age: int
    term_weights: tuple[Float32Array, ...]  # each [num_loss_tokens], in the order of loss.terms
    needs_targets: bool = True  # False: no term compares its text with the teacher
    is_filler: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatchPlan:
    """The sequences that one forward and backward pass packs into one row."""

    sequences: tuple[PlannedSequence, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepPlan:
    """One optimizer step: for each rank the same number of micro-batches, nearly equal tokens."""

    step: int
    phi: float
    psi: float
    mix: Mix
    ranks: tuple[tuple[MicroBatchPlan, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LearnerBatch:
    """One packed row: whole sequences one after the other, no padding.

    Position `loss_positions_N[i]` predicts `labels_N[i]`; it is the position before the label's.
    """

    token_ids_L: Int32Array
    position_ids_L: Int32Array  # restart at 0 with every sequence
    boundaries: Int32Array  # [S + 1], cumulative sequence starts: 0 ... L
    loss_positions_N: Int32Array
    labels_N: Int32Array
    term_weights_N: tuple[Float32Array, ...]  # one array for each of loss.terms
    sequence_index_N: Int32Array  # which of the S sequences a loss position belongs to
    rollout_ids: tuple[str, ...]  # S of them
    shelves: tuple[Shelf, ...]
    ages: tuple[int, ...]
    is_filler: tuple[bool, ...]
    # Stacked over the N loss positions, with some filling where a sequence needs none; None: no
    # sequence of the row needs any.
    targets: TeacherTargets | None
    behaviour_logprobs_N: Float32Array | None = None  # the engine's; NaN where it gave none


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Work:
    """What the replay buffer wants done: ordinals to generate, sequences to score ahead.

    `incarnation` grows with every restore. Work of an earlier incarnation is out of date.
    """

    incarnation: int
    demand: tuple[Demand, ...]
    dataset: tuple[Rollout, ...]  # of the data set and the corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferCounters:
    """What the replay buffer holds, and totals since the start of the run."""

    fresh: int  # finished, not drawn yet
    replay: int  # on the replay shelf
    outstanding: int  # demanded, not finished
    demanded: int
    duplicates: int  # second rollouts for an ordinal, which are ignored
    late: int  # fresh sequences of an age above lookahead + sync_interval - 2


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawFacts:
    """What a step drew, without the sequences: for the log."""

    phi: float
    psi: float
    mix: Mix
    fresh_ages: tuple[int, ...] = ()
    replay_ages: tuple[int, ...] = ()
    untargeted_sequences: int = 0  # those that no term compares with the teacher
    untargeted_tokens: int = 0  # of these sequences, prompts included
    draw_digest: str = ""  # of the ids drawn, by shelf: two runs that drew the same have the same
    rollout_ids: dict[str, tuple[str, ...]] = field(default_factory=dict)  # by shelf, if asked for


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankPlan:
    """One rank's share of a step."""

    phi: float  # of the draw
    facts: DrawFacts | None  # of the whole step, for the log; rank 0's only, which reports the step
    micro_batches: tuple[MicroBatchPlan, ...]


# ---- run control ------------------------------------------------------------------------------

TRAINING = "training"
"""The phase in which learners take steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """Whether the run goes on, and what it does now."""

    phase: str = ""  # of the driver
    stop: bool = False  # the job was asked to end: write a checkpoint and return
    failure: str | None = None  # an error that a restart does not repair; it ends the job
    waiting: str = ""  # what the learners wait for; empty if they do not wait
    leaving: frozenset[str] = frozenset()  # ids of the nodes that the cluster will take away soon
    losing: frozenset[str] = frozenset()  # those of them that learners or the driver are on
    waited_s: float = 0.0  # by the learners for samples, in training, since they started

    @property
    def ends(self) -> bool:
        """Whether the run must end before its last step."""
        return self.stop or self.failure is not None


# ---- learner to the rest ----------------------------------------------------------------------


Bucket: TypeAlias = dict[str, tuple[tuple[int, ...], str, NDArray[np.uint8]]]
"""Part of a model's weights: name in the checkpoint -> (shape, dtype name, flat bytes).

The dtype name is one such as "bfloat16". Ray passes a bucket on without copying it, and reading one
requires neither torch nor pickle.
"""

BucketT = TypeVar("BucketT")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterBase:
    """What published adapters are added to: the model directory's weights. Names of dtypes."""

    trained: str  # in which the learner holds the frozen weights
    published: str  # of the sum
    scale: float  # alpha / rank


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights(Generic[BucketT]):
    """Published student weights.

    The learner publishes `Weights[ObjectRef[Bucket]]`, whose buckets are in Ray's object store; a
    generator loads `Weights[Bucket]`.
    """

    version: int  # completed optimizer steps
    buckets: tuple[BucketT, ...]
    nbytes: int
    adapters: AdapterBase | None = None  # None: the buckets are whole weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Teacher-forced cross-entropy on held-out data-set responses, token mean, in nats."""

    step: int  # completed optimizer steps; 0 is before training
    loss: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainStep:
    """What the learners report of one optimizer step, reduced over ranks."""

    step: int  # completed optimizer steps, the first is 1
    loss: float  # weighted sum over the global batch
    loss_by_shelf: dict[str, float] = field(default_factory=dict)  # token means, finite tokens
    loss_by_term: dict[str, float] = field(default_factory=dict)  # before each term's weight
    alpha_by_term: dict[str, float] = field(default_factory=dict)  # sequence means of curricula
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    tokens: int = 0  # packed tokens of the global batch
    loss_tokens: int = 0
    positions: int = 0  # tokens computed, fillers included
    seconds: float = 0.0
    wait_seconds: float = 0.0  # waiting for batches, on the slowest rank
    skipped: bool = False  # non-finite loss or gradient
    infinite_tokens: int = 0  # tokens whose divergence is +inf (an id possible for one side only)
    rank_token_imbalance: float = 0.0  # (most - fewest) / most tokens of a rank
    # Mean |engine - learner| over tokens of age 0; NaN without any, or with rollout.teacher_mix.
    logprob_gap: float = math.nan
    # Means over a sample of the student's own tokens (loss/token_health.py); NaN without any.
    student_entropy: float = math.nan  # nats
    teacher_entropy: float = math.nan
    top_overlap: float = math.nan  # of the two sides' most likely ids, 0 to 1
    teacher_probability: float = math.nan  # of the tokens themselves
