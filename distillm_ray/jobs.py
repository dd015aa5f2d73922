"""`evaluate` and `generate`: jobs that only answer prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distillm_ray.cluster import resources
from distillm_ray.cluster.cluster import Cluster
from distillm_ray.cluster.connection import available, connect, resolve_device
from distillm_ray.config import Config, CrossEntropy, LossConfig
from distillm_ray.data.files import check_files
from distillm_ray.data.splits import load_dataset, load_splits
from distillm_ray.errors import DataError, RunDirectoryError
from distillm_ray.evaluation import inference
from distillm_ray.evaluation.results import Evaluation
from distillm_ray.models.directory import ModelFacts, check_lengths, check_model_directory
from distillm_ray.report.console import ConsoleView
from distillm_ray.run_directory import MODEL_FOLDER
from distillm_ray.types import FinishReason, Source


def evaluate(config: Config, model: Path | None, output: Path | None, view: ConsoleView) -> Table:
    """Score a model on the config's test split (validation, where there is none).

    Writes the same JSON as the end of a run does; returns the table.

    Raises:
        UserError: the model or the data cannot be used.
    """
    directory = model or config.run.directory / MODEL_FOLDER
    if model is None and not directory.exists():
        raise RunDirectoryError(
            f"{config.run.directory} has no {MODEL_FOLDER}/, which a finished run leaves: run"
            " `distillm-ray train` to its end first, or name a model with --model"
        )
    if output is not None and output.exists() and not output.is_dir():
        raise DataError(f"--output {output} must be a directory, it is a file")
    facts = _check(config, directory)
    check_files(config.data)
    cluster = _connect(config, view)
    tokenizer = _tokenizer(directory, config)
    view.start("reading data")
    splits = load_splits(config.data, tokenizer, config.run.seed)
    test = splits.test or splits.validation
    prompts = test.prompts[: config.evaluation.max_prompts]
    view.start(f"answering {len(prompts)} prompts")
    scores, _ = inference.score_model(
        cluster,
        config,
        facts,
        config.student,
        prompts,
        splits.validation.demonstrations[: config.validation.max_prompts],
        tokenizer=tokenizer,
        end_token_id=test.end_token_id,
    )
    evaluation = Evaluation(
        models={str(directory): scores},
        num_prompts=len(prompts),
        seeds=inference.evaluation_seeds(config),
    )
    assert scores.rouge_l is not None
    assert scores.bleu is not None
    table = Table("model", "validation loss", "ROUGE-L", "BLEU")
    table.add_row(
        str(directory),
        f"{scores.validation_loss:.4f}",
        f"{scores.rouge_l.mean:.2f}",
        f"{scores.bleu.mean:.2f}",
    )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        evaluation.write(output)
    return table


def generate(
    config: Config,
    model: Path,
    prompt_files: Sequence[Path],
    output: Path,
    keep_truncated: bool,
    view: ConsoleView,
) -> list[str]:
    """Answer prompts with `model` under `rollout.sampling`; one JSONL row an answer, in order.

    Each row has the prompt's id, the prompt, the response, and why it ended. Returns a summary.

    Raises:
        UserError: the model or the prompts cannot be used, or `output` exists.
    """
    if output.exists():
        raise DataError(f"--output {output} exists and is not overwritten; remove it first")
    for path in prompt_files:
        if not path.exists():
            raise DataError(f"--prompts {path} does not exist")
    facts = _check(config, model)
    cluster = _connect(config, view)
    tokenizer = _tokenizer(model, config)
    view.start("reading prompts")
    dataset = load_dataset(
        prompt_files, config.data, tokenizer, split="test", require_responses=False
    )
    view.start(f"answering {len(dataset.prompts)} prompts")
    with inference.answering(
        cluster,
        config,
        facts,
        Source.TEACHER,
        end_token_id=dataset.end_token_id,
        trust_remote_code=config.student.trust_remote_code,
    ) as loop:
        answers = inference.answer_all(
            loop,
            dataset.prompts,
            config.rollout.sampling.model_copy(update={"max_tokens": config.max_response_tokens}),
            config.run.seed,
            tokenizer=tokenizer,
            timeout_s=config.rollout.timeout_s * max(1, len(dataset.prompts) // 8),
        )
    kept = [
        (prompt, answer)
        for prompt, answer in zip(dataset.prompts, answers, strict=True)
        if answer.text and (keep_truncated or answer.finish_reason is FinishReason.STOP)
    ]
    partial = output.with_name(f"{output.name}.partial")
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for prompt, answer in kept:
            row = {
                "id": prompt.prompt_id,
                "prompt": prompt.text,
                "response": answer.text,
                "finish_reason": str(answer.finish_reason),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.rename(output)
    return [
        f"{output}: {len(kept)} responses to {len(dataset.prompts)} prompts"
        f" ({len(dataset.prompts) - len(kept)} truncated or empty ones left out)"
    ]


def _tokenizer(directory: Path, config: Config) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        directory, trust_remote_code=config.student.trust_remote_code
    )


def _check(config: Config, directory: Path) -> ModelFacts:
    facts = check_model_directory(
        directory, "model", trust_remote_code=config.student.trust_remote_code
    )
    check_lengths(config, None, facts)
    return facts


def _connect(config: Config, view: ConsoleView) -> Cluster:
    """A cluster that has the resources of the generators."""
    view.start("connecting to Ray")
    connect(config)
    device = resolve_device(config)
    # Neither scorers nor learners run here; the validation task takes a learner's place.
    alone = config.model_copy(update={"loss": LossConfig(terms=(CrossEntropy(),))})
    resources.check(resources.request(alone, device), available())
    return Cluster(config, device)
