"""The responses that were scored, as JSONL: what is behind the numbers of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from distillm_ray.files import write_atomically
from distillm_ray.text_metrics import exact_match, rouge
from distillm_ray.types import Prompt, Rollout

RESPONSES_FOLDER = "responses"
"""In a run directory: a file for each model that was scored."""


def write_responses(
    path: Path,
    prompts: Sequence[Prompt],
    by_seed: Sequence[Sequence[Rollout]],
    seeds: Sequence[int],
) -> None:
    """A row for each response, seed by seed, with its own scores; replaces the file."""
    references = [prompt.references for prompt in prompts]
    rows = []
    for seed, responses in zip(seeds, by_seed, strict=True):
        texts = [response.text for response in responses]
        rouge_l, exact = rouge(texts, references)["rouge_l"], exact_match(texts, references)
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            rows.append(
                {
                    "id": prompt.prompt_id,
                    "seed": seed,
                    "prompt": prompt.text,
                    "response": response.text,
                    "references": list(prompt.references),
                    "finish_reason": str(response.finish_reason),
                    "tokens": len(response.response_ids),
                    "rouge_l": round(float(rouge_l[index]), 2),
                    "exact_match": bool(exact[index]),
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode("utf-8", "replace"))
