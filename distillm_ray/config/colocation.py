"""`run.placement: colocated`: the parts of a GPU that a learner and a generator have, and rules.

A learner and a generator share each GPU. `num_gpus` of both sections are their parts. For Ray they
are what is reserved. For the memory they are what each may keep while the generators are awake:
vLLM takes `gpu_memory_utilization` of the GPU when it starts, and the learner's weights and
optimizer state stay in the rest.
"""

from __future__ import annotations

from distillm_ray.config.fields import shown_range
from distillm_ray.config.roles import ActorRange, LearnerConfig, TeacherConfig
from distillm_ray.config.rollout import RolloutConfig, VllmEngine
from distillm_ray.config.run import RunConfig

_SMALLEST_PART = 0.51  # of a generator: two of them must not fit on one GPU
_DIGITS = 4  # Ray counts GPUs in parts of 1/10,000


def with_parts(
    learner: LearnerConfig, rollout: RolloutConfig
) -> tuple[LearnerConfig, RolloutConfig]:
    """Both sections with `num_gpus` where they leave it out: vLLM's memory, and the rest."""
    if not isinstance(rollout.engine, VllmEngine):
        return learner, rollout
    part = rollout.num_gpus
    if part is None:
        part = max(rollout.engine.gpu_memory_utilization, _SMALLEST_PART)
        if learner.num_gpus is not None:
            part = 1.0 - learner.num_gpus
        rollout = rollout.model_copy(update={"num_gpus": round(part, _DIGITS)})
    if learner.num_gpus is None:
        learner = learner.model_copy(update={"num_gpus": round(1.0 - part, _DIGITS)})
    return learner, rollout


def check_colocated(
    run: RunConfig,
    learner: LearnerConfig,
    rollout: RolloutConfig,
    teacher: TeacherConfig | None,
    *,
    generates: bool,
) -> None:
    """Rules of `run.placement: colocated`, after `with_parts`.

    `generates`: whether the run has generators at all.

    Raises:
        ValueError: with key, rule, value and remedy.
    """
    separate = "or set run.placement=separate"
    if run.mode == "local":
        raise ValueError(
            "run.placement must be separate with run.mode=local, got colocated: one process has all"
            " roles there, one after the other; remove the key"
        )
    if not generates:
        raise ValueError(
            "run.placement must be separate where a run generates nothing, got colocated: the"
            " learners have their GPUs alone; remove the key"
        )
    if not isinstance(rollout.engine, VllmEngine):
        raise ValueError(
            f"rollout.engine.type must be vllm with run.placement=colocated, got"
            f" {rollout.engine.type}: generators sleep while the learners step, and only vLLM frees"
            f" its memory and says beforehand how much it takes; set rollout.engine.type=vllm"
            f" {separate}"
        )
    if isinstance(rollout.actors, ActorRange):
        shown = shown_range(rollout.actors.model_dump(include={"min", "max"}))
        raise ValueError(
            f"rollout.actors must be one number with run.placement=colocated, got {shown}: there"
            f" is one generator beside each learner; set rollout.actors={learner.workers}"
            f" {separate}"
        )
    if rollout.tensor_parallel != 1:
        raise ValueError(
            f"rollout.tensor_parallel must be 1 with run.placement=colocated, got"
            f" {rollout.tensor_parallel}: Ray gives a process whole GPUs or a part of one, so a"
            f" generator cannot have parts of several; set rollout.tensor_parallel=1 {separate}"
        )
    if rollout.actors != learner.workers:
        raise ValueError(
            f"rollout.actors must equal learner.workers with run.placement=colocated, got"
            f" {rollout.actors} and {learner.workers}: each GPU has one generator and one learner;"
            f" set rollout.actors={learner.workers} {separate}"
        )
    if rollout.node_labels != learner.node_labels:
        raise ValueError(
            "rollout.node_labels must equal learner.node_labels with run.placement=colocated, got"
            f" {shown_range(rollout.node_labels)} and {shown_range(learner.node_labels)}: they are"
            " processes on the same nodes; give both the same labels"
        )
    _check_parts(rollout.engine, rollout.num_gpus, learner.num_gpus)
    if teacher is not None and teacher.num_gpus is not None and teacher.num_gpus % 1 != 0:
        raise ValueError(
            "teacher.num_gpus must be a whole number with run.placement=colocated, got"
            f" {teacher.num_gpus:g}: a scorer works in both turns, so it keeps its memory, and"
            " would get the part of a GPU that is a learner's; remove the key: scorers have GPUs of"
            " their own"
        )


def _check_parts(engine: VllmEngine, own: float | None, other: float | None) -> None:
    """Of each GPU: the generator's own one, and the learner's."""
    assert own is not None and other is not None, "filled in by `with_parts`"
    if round(own + other, _DIGITS) != 1.0 or own < _SMALLEST_PART or other <= 0.0:
        raise ValueError(
            "rollout.num_gpus + learner.num_gpus must be 1 with run.placement=colocated, with"
            f" rollout.num_gpus at least {_SMALLEST_PART} and below 1, got {own:g} + {other:g}:"
            " Ray would put two generators or two learners on one GPU; remove both keys, and they"
            " follow from rollout.engine.gpu_memory_utilization (below 1)"
        )
    if engine.gpu_memory_utilization > own:
        raise ValueError(
            f"rollout.engine.gpu_memory_utilization must be at most rollout.num_gpus ="
            f" {own:g} with run.placement=colocated, got {engine.gpu_memory_utilization:g}: the"
            f" rest of the GPU's memory is the learner's, which keeps its weights there while"
            f" vLLM works; set rollout.engine.gpu_memory_utilization={own:g}, or remove"
            " rollout.num_gpus and learner.num_gpus"
        )
