"""Models, the processes that run them, and what one process of a role asks of its node."""

from __future__ import annotations

import math
from fractions import Fraction as FractionOf
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from distillm_ray.config.fields import (
    LARGEST_INTEGER,
    Above0,
    AbsolutePath,
    Amount,
    Dtype,
    Fraction,
    Integer,
    LabelKey,
    LabelValue,
    Location,
    MayChange,
    NonNegative,
    Number,
    Positive,
    Section,
    shown_range,
)

Offload: TypeAlias = Literal["none", "cpu", "nvme"]
ActivationCheckpointing: TypeAlias = Literal["none", "full"] | Annotated[Integer, Field(ge=2)]


class ModelConfig(Section):
    """A Hugging Face directory with safetensors, on disk or in a store, and how it is loaded."""

    model: Location
    dtype: Dtype = "auto"
    trust_remote_code: bool = False


class ProcessConfig(Section):
    """What one process of a role asks of its node."""

    num_cpus: MayChange[Annotated[Amount, Field(le=LARGEST_INTEGER)]] = 1.0
    num_gpus: MayChange[Amount | None] = None  # None: as many as the role needs, 0 without GPUs
    num_threads: MayChange[Positive] = Field(
        default_factory=lambda values: max(1, int(values.get("num_cpus", 1))),
        validate_default=False,
    )  # CPU threads; default: num_cpus
    # Nodes that run it must have these labels (`ray start --labels`).
    node_labels: MayChange[dict[LabelKey, LabelValue]] = Field(default_factory=dict)


class ActorRange(Section):
    """The size of an elastic pool. It starts with `min` and grows while the learners wait for it.

    It shrinks while its members are idle (`cluster/elasticity.py`).
    """

    min: Positive  # these have to start, and stay
    max: Positive
    grow_after_s: Above0 = 30.0  # of too few members, before more are asked for
    shrink_after_s: Above0 = 120.0  # of idle members, before some are released

    @model_validator(mode="after")
    def _is_a_range(self) -> ActorRange:
        if self.max < self.min:
            raise ValueError(
                f"max must be at least min, got {self.max} < {self.min}: lower min or raise max"
            )
        return self


def _form_of(actors: Any) -> str:
    return "[range]" if isinstance(actors, dict | ActorRange) else "[number]"


# Names of the forms in brackets: they are no keys, so errors.py leaves them out of a location.
Actors = Annotated[
    Annotated[Positive, Tag("[number]")] | Annotated[ActorRange, Tag("[range]")],
    Discriminator(_form_of),
]
"""How many processes a pool has."""


class PoolConfig(ProcessConfig):
    """A pool of identical processes."""

    actors: MayChange[Actors] = 1  # a number, or {min: …, max: …} in rollout and teacher
    min_actors: MayChange[Positive] = 1  # fewer that work or can be restarted end the run
    tensor_parallel: MayChange[Positive] = 1  # GPUs that one model is split over

    @model_validator(mode="after")
    def _minimum_is_reachable(self) -> PoolConfig:
        if self.min_actors > self.fewest:
            key = "actors.min" if isinstance(self.actors, ActorRange) else "actors"
            raise ValueError(
                f"min_actors must be at most {key}, got {self.min_actors} > {self.fewest}: the run"
                f" would end before it starts; lower min_actors or raise {key}"
            )
        return self

    @property
    def fewest(self) -> int:
        """Processes that the pool starts with and keeps."""
        return self.actors.min if isinstance(self.actors, ActorRange) else self.actors

    @property
    def most(self) -> int:
        """Processes that the pool may have."""
        return self.actors.max if isinstance(self.actors, ActorRange) else self.actors


class TeacherConfig(ModelConfig, PoolConfig):
    """The frozen teacher, and the pool of scorers that runs it."""

    max_batch_tokens: MayChange[Positive] = 8192  # packed into one forward pass
    timeout_s: MayChange[Above0] = 600.0  # of one forward pass; then the scorer is replaced


class LoraConfig(Section):
    """Train low-rank adapters and keep the student's own weights frozen (peft)."""

    rank: Positive = 16
    alpha: Above0 = 32.0
    dropout: Annotated[Number, Field(ge=0.0, lt=1.0)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class StudentConfig(ModelConfig):
    """The model that learns."""

    lora: LoraConfig | None = None


class TargetsConfig(Section):
    """What the teacher targets of a token are, and the stores and the library that keep them."""

    type: Literal["hidden", "top_k", "logits"] = "hidden"
    k: Positive = 64  # type: top_k
    stores: MayChange[Positive] = 1
    # Of all stores together. auto: twice what the run is expected to need, as far as the object
    # stores of the nodes have room.
    max_bytes: MayChange[Positive | Literal["auto"]] = "auto"
    # A directory in which targets outlive the run, shared by runs and by all nodes.
    library: MayChange[AbsolutePath | None] = None
    library_max_bytes: MayChange[Positive] = 50 * 2**30  # on disk, all teachers together

    @property
    def limit(self) -> int:
        """`max_bytes`, once `teacher/target_sizes.py` has settled what `auto` is in this run."""
        assert self.max_bytes != "auto", "the size of the targets is not known before the data"
        return self.max_bytes


def _no_range(workers: Any) -> Any:
    if isinstance(workers, dict):
        raise ValueError(
            f"must be one number, got {shown_range(workers)}: DeepSpeed (ZeRO) splits the optimizer"
            " state over the ranks, and a group of another size cannot load what these have saved;"
            " with zero_stage 0 a run may be resumed with another number. Pools without such a"
            " state may be a range: rollout.actors and teacher.actors"
        )
    return workers


class LearnerConfig(ProcessConfig):
    """The Ray Train group and its DeepSpeed engine."""

    # On resume another number with zero_stage 0 only.
    workers: MayChange[Annotated[Positive, BeforeValidator(_no_range)]] = 1
    zero_stage: MayChange[Annotated[Integer, Field(ge=0, le=3)]] = 1  # between 1 and 2 only
    # Where the optimizer's state is kept, and under ZeRO-3 the weights: not on the GPU.
    offload: Offload = "none"
    offload_directory: MayChange[AbsolutePath | None] = None  # offload: nvme; a disk of each node
    # Layers whose activations are computed again in the backward pass: none, all (full), or every
    # N-th one.
    activation_checkpointing: MayChange[ActivationCheckpointing] = "none"
    steps: MayChange[Positive | None] = None  # optimizer steps; with epochs: at most
    epochs: MayChange[Above0 | None] = None  # passes over data.train, if every slot were of it
    epoch_rows: MayChange[Positive | None] = None  # filled in when the data is read
    batch_size: Positive  # sequences of the global batch
    max_micro_batch_tokens: MayChange[Positive] = 8192  # of one packed row
    learning_rate: MayChange[Above0] = 1e-5
    min_learning_rate_ratio: MayChange[Fraction] = 0.1  # the cosine ends here
    warmup_steps: MayChange[NonNegative] = 0
    weight_decay: MayChange[Amount] = 0.0  # of matrices; biases and norms do not decay
    adam_betas: MayChange[tuple[Number, Number]] = (0.9, 0.95)
    adam_epsilon: MayChange[Above0] = 1e-8
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: to compare runs without Adam's rounding
    max_gradient_norm: MayChange[Above0] = 1.0
    max_skipped_steps: MayChange[NonNegative] = 10  # non-finite steps in a row before the run stops
    prefetch_steps: MayChange[Positive] = 1  # steps collated ahead of the training thread
    data_timeout_s: MayChange[Above0] = 1800.0  # waiting for one step's samples, while training
    max_restarts: MayChange[NonNegative] = 3  # in a row from the same checkpoint

    @model_validator(mode="after")
    def _offload_is_possible(self) -> LearnerConfig:
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(
                f"zero_stage must be at least 1 with offload: {self.offload}, got 0: DeepSpeed"
                " offloads only what ZeRO divides; set zero_stage=1"
            )
        if self.offload == "nvme" and self.zero_stage != 3:
            raise ValueError(
                f"zero_stage must be 3 with offload: nvme, got {self.zero_stage}: DeepSpeed writes"
                " no other stage's state to a disk; set zero_stage=3 or offload=cpu"
            )
        if self.offload == "nvme" and self.offload_directory is None:
            raise ValueError(
                "offload_directory is required with offload: nvme, got none: name a directory on a"
                " fast local disk, as in offload_directory=/nvme/offload"
            )
        if self.offload != "nvme" and self.offload_directory is not None:
            raise ValueError(
                f"offload_directory needs offload: nvme, got offload: {self.offload}: nothing would"
                " be written there; set offload=nvme or remove the key"
            )
        return self

    @property
    def known_steps(self) -> int | None:
        """Optimizer steps of the whole run; None before the rows of an epoch are known."""
        if self.epochs is None:
            return self.steps
        if self.epoch_rows is None:
            return None
        # As written: 1.1 is a little more than 11/10 in binary, which would add a step.
        epochs = FractionOf(str(self.epochs))
        steps = math.ceil(epochs * self.epoch_rows / self.batch_size)
        return min(steps, self.steps or steps)

    @property
    def num_steps(self) -> int:
        """`known_steps` once the data is read (`Config.with_rows`)."""
        steps = self.known_steps
        assert steps is not None, "the steps of an epoch are not known before the data"
        return steps
