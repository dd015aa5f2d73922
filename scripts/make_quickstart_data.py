"""Make the quickstart's data set: the teacher's responses to its prompts.

    python scripts/prepare_quickstart.py
    python scripts/make_quickstart_data.py

Reads data/quickstart/prompts.jsonl and writes the prompts whose response is complete to
data/quickstart/{train,validation,test}.jsonl. What is learned from is sampled, as a data set of
text is; the references of the test are the teacher's greedy responses. Takes some minutes on two
cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path("data/quickstart")
PROMPTS = FOLDER / "prompts.jsonl"
TEMPERATURES = {"train": 1.0, "validation": 1.0, "test": 0.0}


def main() -> None:
    for split, temperature in TEMPERATURES.items():
        prompts = [row for row in _rows(PROMPTS) if row["split"] == split]
        with tempfile.TemporaryDirectory() as folder:
            path, output = Path(folder) / "prompts.jsonl", Path(folder) / "responses.jsonl"
            path.write_text(_lines(prompts), encoding="utf-8")
            command = [sys.executable, "-m", "distillm_ray.cli", "generate"]
            command += ["configs/quickstart.yaml", "--model", "models/smollm2-135m-instruct"]
            command += ["--prompts", str(path), "--output", str(output)]
            command += [f"generate.sampling.temperature={temperature}"]
            command += ["generate.sampling.max_tokens=96"]
            subprocess.run(command, check=True)
            response_of = {row["id"]: row["response"] for row in _rows(output)}
        kept = [
            {name: row[name] for name in ("id", "topic", "kind", "prompt")}
            | {"response": response_of[row["id"]]}
            for row in prompts
            if row["id"] in response_of
        ]
        (FOLDER / f"{split}.jsonl").write_text(_lines(kept), encoding="utf-8")
        print(f"{split}: {len(kept)} of {len(prompts)}")


def _rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
