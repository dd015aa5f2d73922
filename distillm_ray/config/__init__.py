"""The config: one frozen tree that says what a run is.

Each role has a section of its own and is never given the whole tree. A choice with parameters is a
union on `type`. `files.py` reads YAML and `key=value` overrides into this tree, and `errors.py`
says what is wrong with them; the other modules define the keys, their defaults and the combinations
that are refused. None imports torch, Ray or vLLM, so a config loads in milliseconds.

A field of type `MayChange[...]` may have another value when a run is resumed; every other field
must keep its value (`learner/resume.py` compares them).
"""

from distillm_ray.config.data import ChatTemplate, ColumnsConfig, DataConfig, PlainTemplate
from distillm_ray.config.fields import RESUMABLE, Dtype, Section, expanded_path
from distillm_ray.config.loss import (
    SAMPLED,
    AdaptiveKL,
    CrossEntropy,
    Divergence,
    ForwardKL,
    JensenShannon,
    LossConfig,
    PolicyGradient,
    ReverseKL,
    Skewed,
    SkewKL,
    SkewReverseKL,
    Term,
    Text,
    TotalVariation,
    has_curriculum,
)
from distillm_ray.config.remote_path import RemotePath
from distillm_ray.config.roles import (
    ActivationCheckpointing,
    ActorRange,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    PoolConfig,
    ProcessConfig,
    StudentConfig,
    TargetsConfig,
    TeacherConfig,
)
from distillm_ray.config.rollout import (
    FilterConfig,
    GeneratorPoolConfig,
    RolloutConfig,
    SamplingConfig,
    TransformersEngine,
    VllmEngine,
)
from distillm_ray.config.run import StopConfig, ValidationMetric
from distillm_ray.config.schedule import (
    AdaptiveSchedule,
    FixedReplayRatio,
    FixedSchedule,
    PairedSchedule,
    ReferenceRule,
    ScheduleConfig,
)
from distillm_ray.config.tree import Config

__all__ = [
    "RESUMABLE",
    "SAMPLED",
    "ActivationCheckpointing",
    "ActorRange",
    "AdaptiveKL",
    "AdaptiveSchedule",
    "ChatTemplate",
    "ColumnsConfig",
    "Config",
    "CrossEntropy",
    "DataConfig",
    "Divergence",
    "Dtype",
    "FilterConfig",
    "FixedReplayRatio",
    "FixedSchedule",
    "ForwardKL",
    "GeneratorPoolConfig",
    "JensenShannon",
    "LearnerConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "PairedSchedule",
    "PlainTemplate",
    "PolicyGradient",
    "PoolConfig",
    "ProcessConfig",
    "ReferenceRule",
    "RemotePath",
    "ReverseKL",
    "RolloutConfig",
    "SamplingConfig",
    "ScheduleConfig",
    "Section",
    "SkewKL",
    "SkewReverseKL",
    "Skewed",
    "StopConfig",
    "StudentConfig",
    "TargetsConfig",
    "TeacherConfig",
    "Term",
    "Text",
    "TotalVariation",
    "TransformersEngine",
    "ValidationMetric",
    "VllmEngine",
    "expanded_path",
    "has_curriculum",
]
