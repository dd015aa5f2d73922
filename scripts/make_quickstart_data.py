"""Make the quickstart's data set: the teacher's responses to its prompts.

    python scripts/prepare_quickstart.py
    python scripts/make_quickstart_data.py

Runs `distillm-ray generate` (greedy, at most 96 tokens, truncated responses left out) and writes
data/quickstart/{train,validation,test}.jsonl. Takes some minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path("data/quickstart")
PROMPTS = FOLDER / "prompts.jsonl"
SETTINGS = ("generate.sampling.temperature=0", "generate.sampling.max_tokens=96")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "responses.jsonl"
        command = [sys.executable, "-m", "distillm_ray.cli", "generate", "configs/quickstart.yaml"]
        command += ["--model", "models/smollm2-135m-instruct", "--prompts", str(PROMPTS)]
        command += ["--output", str(output), *SETTINGS]
        subprocess.run(command, check=True)
        response_of = {row["id"]: row["response"] for row in _rows(output)}
    lines: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for row in _rows(PROMPTS):
        if row["id"] not in response_of:
            continue
        kept = {name: row[name] for name in ("id", "topic", "kind", "prompt")}
        example = {**kept, "response": response_of[row["id"]]}
        lines[row["split"]].append(json.dumps(example, ensure_ascii=False))
    for split, rows in lines.items():
        (FOLDER / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(", ".join(f"{split}: {len(rows)}" for split, rows in lines.items()))


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
