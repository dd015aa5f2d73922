"""What a user should know of a valid config: settings that are unusual, or leave nothing to do."""

from __future__ import annotations

from distillm_ray.config.loss import PolicyGradient, has_curriculum
from distillm_ray.config.tree import Config


def remarks_on(config: Config) -> tuple[str, ...]:
    """A line each, in the order in which they are printed."""
    return (
        *_remarks_on_sampling(config),
        *_remarks_on_mixture(config),
        *_remarks_on_idle_keys(config),
    )


def _remarks_on_idle_keys(config: Config) -> tuple[str, ...]:
    """Keys that are set and have no effect in this run."""
    silent, alone = not config.wants_rollouts, not config.loss.needs_teacher
    steps = config.learner.known_steps
    idle = [
        (silent and config.rollout.teacher_mix > 0, "rollout.teacher_mix", "phi is always 0"),
        (
            silent and config.stop.max_generated_tokens is not None,
            "stop.max_generated_tokens",
            "phi is always 0, so nothing is generated to train on",
        ),
        (
            alone and config.stop.max_teacher_tokens is not None,
            "stop.max_teacher_tokens",
            "no term compares with a teacher",
        ),
        *(
            (
                has_curriculum(term) and steps is not None and term.anchor_steps >= steps,
                f"loss.terms.{index}.curriculum",
                f"the run ends before its anchor is known ({term.anchor_steps} steps)"
                if has_curriculum(term)
                else "",
            )
            for index, term in enumerate(config.loss.terms)
        ),
    ]
    return tuple(
        f"warning: {key} has no effect: {reason}" for is_idle, key, reason in idle if is_idle
    )


def _remarks_on_sampling(config: Config) -> tuple[str, ...]:
    sampling = config.rollout.sampling
    plain = (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    if plain or not any(
        isinstance(term, PolicyGradient) or term.max_importance is not None
        for term in config.loss.terms
    ):
        return ()
    return (
        "warning: rollout.sampling changes the distribution that responses are sampled from,"
        " and policy gradients and importance weights take them for samples of the student at"
        " temperature 1: their expectation is another one than the reverse KL's gradient",
    )


def _remarks_on_mixture(config: Config) -> tuple[str, ...]:
    if not config.mixes_teacher:
        return ()
    uncorrected = [
        f"loss.terms.{index} ({term.type} on {term.on})"
        for index, term in enumerate(config.loss.terms)
        if term.on in ("all", "student")
        and not isinstance(term, PolicyGradient)
        and term.max_importance is None
    ]
    if not uncorrected:
        return ()
    return (
        f"warning: rollout.teacher_mix = {config.rollout.teacher_mix:g} samples responses from a"
        f" mixture with the teacher, and {', '.join(uncorrected)} without importance weights:"
        " the expectation is over the mixture's text, not the student's; set max_importance in"
        " a term with on: student",
    )


def why_not_scored(config: Config) -> str:
    """Why `distillm-ray score` has nothing to do with this config, and the remedy; else empty."""
    if config.targets.library is None:
        return (
            "targets.library is required by `score`, got none: the targets would be thrown away;"
            " name a directory on a disk that all nodes share, as in"
            " targets.library=/shared/targets"
        )
    if not config.loss.needs_teacher:
        return (
            "loss.terms must compare with the teacher to be scored ahead, got only type:"
            " cross_entropy, which needs no targets; `score` has nothing to do for this config"
        )
    data = (config.data.responses,) if config.draws_data else ()
    texts = (*data, "corpus") if config.data.corpus else data
    if not any(config.loss.compares(text) for text in texts):
        held = ", ".join(sorted({term.on for term in config.loss.terms}))
        return (
            f"loss.terms must compare the data with the teacher to be scored ahead, got terms on"
            f" {held} with text of {' and '.join(texts) or 'the student'}: what the student samples"
            " is not known before a run, so `score` has nothing to do for this config"
        )
    return ""
