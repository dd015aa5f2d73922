"""What TensorBoard shows of a record."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

from distillm_ray.log.costs import WORKERS
from distillm_ray.log.records import (
    CostRecord,
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.log.totals import Totals


def scalars(record: Record, totals: Totals) -> Iterator[tuple[str, float]]:
    """Names and values; non-finite values are left out. `totals` include the record."""
    values: dict[str, float] = {}
    match record:
        case StepRecord():
            values = {
                "train/loss": record.loss,
                **{f"train/loss_{shelf}": loss for shelf, loss in record.loss_by_shelf.items()},
                **{
                    f"train/loss_term/{_tag(term)}": loss
                    for term, loss in record.loss_by_term.items()
                },
                **{
                    f"train/alpha_term/{_tag(term)}": alpha
                    for term, alpha in record.alpha_by_term.items()
                },
                "train/learning_rate": record.learning_rate,
                "train/gradient_norm": record.gradient_norm,
                "train/tokens": record.tokens,
                "train/infinite_tokens": record.infinite_tokens,
                "train/skipped": float(record.skipped),
                "train/rank_token_imbalance": record.rank_token_imbalance,
                "train/seconds": record.seconds,
                "train/wait_seconds": record.wait_seconds,
                "schedule/phi": record.phi,
                "schedule/rollout_rate": record.psi,
                "age/fresh_mean": record.fresh_age_mean,
                "age/replay_mean": record.replay_age_mean,
                "rollout/logprob_gap": record.logprob_gap,
                "targets/reuse_sequences": totals.target_reuse_sequences,
                "targets/reuse_tokens": totals.target_reuse_tokens,
                "health/student_entropy": record.student_entropy,
                "health/teacher_entropy": record.teacher_entropy,
                "health/top_overlap": record.top_overlap,
                "health/teacher_probability": record.teacher_probability,
                **_response_shares(record),
            }
            for group, part in (
                ("mix", record.mix),
                ("buffer", record.buffer),
                ("actors", record.actors),
                ("work", record.work),
            ):
                for name, value in dataclasses.asdict(part).items():
                    values[f"{group}/{name}"] = value
            if not record.mix.corpus:  # a run without a corpus has no curve of it
                del values["mix/corpus"]
        case ValidationRecord():
            values = {"validation/loss": record.loss, "schedule/phi_next": record.phi}
        case PublishRecord():
            values = {"publish/seconds": record.seconds, "publish/bytes": record.nbytes}
        case CostRecord():
            values = dict(_costs(record, totals))
    yield from ((name, value) for name, value in values.items() if math.isfinite(value))


def _costs(record: CostRecord, totals: Totals) -> Iterator[tuple[str, float]]:
    """Of the period that the record covers; `cost/cpu_seconds` of the run so far."""
    yield "cost/cpu_seconds", sum(cost.cpu_seconds for cost in totals.costs.values())
    if any(cost.gpu_seconds for cost in totals.costs.values()):
        yield "cost/gpu_seconds", sum(cost.gpu_seconds for cost in totals.costs.values())
    if record.seconds <= 0:
        return
    for role, cost in record.roles.items():
        yield f"cost/busy_cores/{role}", cost.cpu_seconds / record.seconds
        if cost.gpu_seconds:
            yield f"cost/gpus/{role}", cost.gpu_seconds / record.seconds
        if role in WORKERS:
            yield f"cost/busy_share/{role}", cost.busy_share
            yield f"cost/queue/{role}", cost.queue_seconds / record.seconds
            yield f"cost/tokens_per_second/{role}", cost.tokens / record.seconds
            yield f"cost/tokens_per_cpu_second/{role}", cost.tokens_per_cpu_second


def _response_shares(record: StepRecord) -> dict[str, float]:
    """Of the responses generated since the step before; none without any."""
    work = record.work
    if not work.generated_sequences:
        return {}
    shares = {name: getattr(work, name) for name in ("truncated", "empty", "looping")}
    return {
        "health/response_tokens": work.generated_tokens / work.generated_sequences,
        **{f"health/{name}": count / work.generated_sequences for name, count in shares.items()},
    }


def _tag(name: str) -> str:
    """A term's name with the characters that TensorBoard allows in a tag."""
    return re.sub(r"[^\w.]+", "_", name).strip("_")


def texts(record: Record) -> Iterator[tuple[str, str]]:
    """Names and Markdown for TensorBoard's text page."""
    match record:
        case ProbeRecord(samples=samples):
            for index, sample in enumerate(samples):
                yield (
                    f"probe/{index}",
                    f"**Prompt**\n\n{sample.prompt}\n\n**Response**\n\n{sample.response}",
                )
        case EventRecord(name=name, detail=detail):
            yield f"event/{name}", detail or name
