"""The quickstart's data: its prompts, answered by its teacher, one file a split.

    python scripts/prepare_quickstart.py
    python scripts/make_quickstart_data.py

runs `distillm-ray generate` (greedy, at most 96 tokens; truncated answers are left out) and writes
data/quickstart/{train,validation,test}.jsonl. It takes some minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

FOLDER = Path("data/quickstart")
PROMPTS = FOLDER / "prompts.jsonl"
SETTINGS = ("rollout.sampling.temperature=0", "rollout.sampling.max_tokens=96")


def main() -> None:
    """Generate, join by id, write."""
    with tempfile.TemporaryDirectory() as folder:
        responses = Path(folder) / "responses.jsonl"
        command = [sys.executable, "-m", "distillm_ray.cli", "generate", "configs/quickstart.yaml"]
        command += ["--model", "models/smollm2-135m-instruct", "--prompts", str(PROMPTS)]
        command += ["--output", str(responses), *SETTINGS]
        subprocess.run(command, check=True)
        answers = {row["id"]: row["response"] for row in _rows(responses)}
    counts: Counter[str] = Counter()
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for row in _rows(PROMPTS):
        if row["id"] not in answers:
            continue
        kept = {name: row[name] for name in ("id", "topic", "kind", "prompt")}
        answered = {**kept, "response": answers[row["id"]]}
        lines[row["split"]].append(json.dumps(answered, ensure_ascii=False))
        counts[row["split"]] += 1
    for split, rows in lines.items():
        (FOLDER / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(", ".join(f"{split}: {count}" for split, count in counts.items()))


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
