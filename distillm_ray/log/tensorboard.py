"""What TensorBoard gets to see of a record."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from distillm_ray.log.records import (
    EventRecord,
    ProbeRecord,
    PublishRecord,
    Record,
    StepRecord,
    ValidationRecord,
)


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Names and values for TensorBoard; what is not finite is left out."""
    values: dict[str, float] = {}
    match record:
        case StepRecord(work=work, buffer=buffer):
            values = {
                "train/loss": record.loss,
                **{f"train/loss_{shelf}": loss for shelf, loss in record.loss_by_shelf.items()},
                **{
                    f"train/loss_term/{_tag(term)}": loss
                    for term, loss in record.loss_by_term.items()
                },
                "train/learning_rate": record.learning_rate,
                "train/gradient_norm": record.gradient_norm,
                "train/tokens": record.tokens,
                "train/infinite_tokens": record.infinite_tokens,
                "train/skipped": float(record.skipped),
                "train/rank_token_imbalance": record.rank_token_imbalance,
                "schedule/phi": record.phi,
                "schedule/rollout_rate": record.psi,
                "mix/fresh": record.mix.fresh,
                "mix/replay": record.mix.replay,
                "mix/dataset": record.mix.dataset,
                "age/fresh_mean": record.fresh_age_mean,
                "age/replay_mean": record.replay_age_mean,
                "buffer/fresh": buffer.fresh,
                "buffer/replay": buffer.replay,
                "buffer/in_flight": buffer.in_flight,
                "targets/bytes": buffer.target_bytes,
                "targets/hits": work.target_hits,
                "targets/misses": work.target_misses,
                "work/generated_tokens": work.generated_tokens,
                "work/scored_tokens": work.scored_tokens,
                "work/lost_ordinals": work.lost,
                "seconds/step": record.seconds,
                "seconds/waiting": record.wait_seconds,
                "seconds/generating": work.generate_seconds,
                "seconds/scoring": work.score_seconds,
                "rollout/logprob_gap": record.logprob_gap,
            }
        case ValidationRecord():
            values = {"validation/loss": record.loss, "schedule/phi_next": record.phi}
        case PublishRecord():
            values = {"publish/seconds": record.seconds, "publish/bytes": record.nbytes}
    yield from ((name, value) for name, value in values.items() if math.isfinite(value))


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
