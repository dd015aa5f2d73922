"""`loss`: its terms, on which text each holds, and how tokens are weighted."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias, TypeGuard

from pydantic import Field, model_validator

from distillm_ray.config.fields import MayChange, Number, Open01, Positive, Section

Text: TypeAlias = Literal["dataset", "student", "teacher", "corpus", "all"]
"""Who wrote a response, or the plain text of the corpus; `all` stands for all responses."""


class LossTerm(Section):
    """One term of the loss: on which text it holds, and its weight in the sum of all terms."""

    on: Text = "all"
    weight: Annotated[Number, Field(gt=0.0)] = 1.0
    # The weight moves here in equal steps over the first half of the run; unset: it stays.
    final_weight: Annotated[Number, Field(gt=0.0)] | None = None
    # Largest weight q / b of a token that the student sampled from b; unset: 1 for every token.
    max_importance: Annotated[Number, Field(gt=0.0)] | None = None

    def covers(self, text: str) -> bool:
        """Whether the term holds on text of this source.

        `all` leaves the corpus out: it has to be named, so that it changes no other term.
        """
        return self.on == text or (self.on == "all" and text != "corpus")

    @property
    def formula(self) -> Self:
        """The term with its parameters only: what decides on the weights has its defaults."""
        weighting = {"on", "weight", "final_weight", "max_importance"}
        return type(self).model_validate(self.model_dump(exclude=weighting))


class ForwardKL(LossTerm):
    """KL(p || q), p the teacher, q the student."""

    type: Literal["forward_kl"] = "forward_kl"


class ReverseKL(LossTerm):
    """KL(q || p)."""

    type: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(LossTerm):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""

    type: Literal["jensen_shannon"] = "jensen_shannon"
    beta: Number = 0.5

    @model_validator(mode="after")
    def _beta_is_inside(self) -> JensenShannon:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta must lie strictly between 0 and 1, got {self.beta}: at the ends the"
                " divergence is 0 everywhere; use type: forward_kl or type: reverse_kl"
            )
        return self


class Skewed(LossTerm):
    """A divergence of one side from a mixture of both, in which that side has the share alpha.

    With the curriculum each sequence has an alpha of its own, at most this one: the closer teacher
    and student are on the sequence, the smaller it is (loss/curriculum.py).
    """

    alpha: Open01 = 0.1
    curriculum: bool = False
    min_alpha: Open01 = 0.01  # of the curriculum
    anchor_steps: Positive = 10  # the curriculum compares later gaps with the mean gap of these

    @model_validator(mode="after")
    def _alphas_are_in_order(self) -> Self:
        if self.curriculum and self.min_alpha >= self.alpha:
            raise ValueError(
                f"min_alpha must be below alpha, got {self.min_alpha:g} >= {self.alpha:g}: the"
                " curriculum lowers alpha to min_alpha; lower min_alpha or raise alpha"
            )
        return self


class SkewKL(Skewed):
    """KL(p || alpha p + (1 - alpha) q)."""

    type: Literal["skew_kl"] = "skew_kl"


class SkewReverseKL(Skewed):
    """KL(q || (1 - alpha) p + alpha q)."""

    type: Literal["skew_reverse_kl"] = "skew_reverse_kl"


class TotalVariation(LossTerm):
    """Half the L1 distance."""

    type: Literal["total_variation"] = "total_variation"


class AdaptiveKL(LossTerm):
    """Forward and reverse KL, weighted by the gaps over the teacher's head (mass mu) and tail."""

    type: Literal["adaptive_kl"] = "adaptive_kl"
    mu: Open01 = 0.5


class CrossEntropy(LossTerm):
    """-log q(token), without a teacher.

    The default is data-set text. On text that the student samples itself, the expected gradient of
    the cross-entropy is zero, so there the term would only add noise.
    """

    type: Literal["cross_entropy"] = "cross_entropy"
    on: Text = "dataset"


class PolicyGradient(LossTerm):
    """Clipped policy gradient of KL(q || p) at the tokens that the student sampled.

    `horizon: token` rewards each token with its own log p - log q, as RL frameworks distil.
    `horizon: rest` rewards it with the mean of the tokens after it: MiniLLM's long part.
    """

    type: Literal["policy_gradient"] = "policy_gradient"
    on: Text = "student"
    horizon: Literal["token", "rest"] = "token"
    clip: Open01 = 0.2  # ratios of the trained to the sampling student count within 1 +- clip

    @model_validator(mode="after")
    def _on_is_student(self) -> PolicyGradient:
        if self.on != "student":
            raise ValueError(
                f"on must be student with type: policy_gradient, got {self.on}: it rewards tokens"
                " that the student sampled"
            )
        return self


SAMPLED = (CrossEntropy, PolicyGradient)
"""Terms that depend on the probability of the sampled token only."""

Divergence: TypeAlias = (
    ForwardKL | ReverseKL | JensenShannon | SkewKL | SkewReverseKL | TotalVariation | AdaptiveKL
)
Term: TypeAlias = Annotated[Divergence | CrossEntropy | PolicyGradient, Field(discriminator="type")]


def has_curriculum(term: Term) -> TypeGuard[SkewKL | SkewReverseKL]:
    """Whether each sequence has an alpha of its own in this term."""
    return isinstance(term, SkewKL | SkewReverseKL) and term.curriculum


class LossConfig(Section):
    """The terms of the loss, and how tokens are weighted in the global batch."""

    terms: tuple[Term, ...] = (SkewKL(),)
    temperature: Annotated[Number, Field(gt=0.0)] = 1.0  # of both distributions in a divergence
    normalize: Literal["source", "tokens", "sequence"] = "source"
    implementation: MayChange[Literal["fused", "plain"]] = "fused"  # plain: the slow reference
    chunk_megabytes: MayChange[Positive | None] = None  # of logits; default: 64, on GPUs 1,024

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with the teacher."""
        return any(not isinstance(term, CrossEntropy) for term in self.terms)

    def compares(self, text: str) -> bool:
        """Whether any term compares text of this source with the teacher."""
        return any(term.covers(text) and not isinstance(term, CrossEntropy) for term in self.terms)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether any term rewards sampled tokens."""
        return any(isinstance(term, PolicyGradient) for term in self.terms)

    @property
    def curricula(self) -> tuple[int, ...]:
        """The indices of the terms whose alpha each sequence has for itself."""
        return tuple(index for index, term in enumerate(self.terms) if has_curriculum(term))

    @model_validator(mode="after")
    def _terms_differ(self) -> LossConfig:
        if not self.terms:
            raise ValueError(
                "loss.terms must hold at least one term, got an empty list: there is nothing to"
                " learn; add one, as in loss.terms=[{type: skew_kl}]"
            )
        seen: dict[tuple[str, LossTerm], int] = {}
        for index, term in enumerate(self.terms):
            if term.max_importance is not None and term.on != "student":
                raise ValueError(
                    f"loss.terms.{index}.max_importance needs on: student, got {term.on}: only"
                    " text that the student sampled has probabilities of its sampling"
                )
            first = seen.setdefault((term.on, term.formula), index)
            if first != index:
                raise ValueError(
                    f"loss.terms must differ in type, parameters or on, got {term.type} on"
                    f" {term.on} as terms {first} and {index}: they are one term with the sum of"
                    " their weights; keep one and set its weight"
                )
        return self
