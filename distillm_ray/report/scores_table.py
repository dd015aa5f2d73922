"""The table of an evaluation: one row a model, one column a score."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.table import Table

from distillm_ray.evaluation.results import STUDENT_AFTER, ModelScores, Score

_COLUMNS = {
    "ROUGE-1": "rouge_1",
    "ROUGE-2": "rouge_2",
    "ROUGE-L": "rouge_l",
    "BLEU": "bleu",
    "exact %": "exact_match",
    "number %": "number_match",
    "tokens": "response_tokens",
    "truncated %": "truncated",
}


def scores_table(models: Mapping[str, ModelScores], *, title: str | None = None) -> Table:
    """Columns that no model has are left out."""
    table = Table(title=title, title_justify="left")
    table.add_column("model")
    table.add_column("validation loss", justify="right")
    columns = {
        name: field
        for name, field in _COLUMNS.items()
        if any(getattr(scores, field) is not None for scores in models.values())
    }
    for name in columns:
        table.add_column(name, justify="right")
    for name, scores in models.items():
        loss = f"{scores.validation_loss:.3f}" if math.isfinite(scores.validation_loss) else "-"
        cells = [
            score_cell(getattr(scores, field), interval=field == "rouge_l")
            for field in columns.values()
        ]
        table.add_row(name, loss, *cells, style="bold" if name == STUDENT_AFTER else None)
    return table


def score_cell(score: Score | None, *, interval: bool = False) -> str:
    """Mean and deviation over seeds, with the interval over prompts on demand."""
    if score is None:
        return "-"
    text = f"{score.mean:.1f} ± {score.std:.1f}" if score.std > 0 else f"{score.mean:.1f}"
    if interval and score.low is not None and score.high is not None:
        text += f" [{score.low:.1f}, {score.high:.1f}]".replace("[", r"\[")
    return text
