"""`distillm-ray evaluate` and `generate`: jobs that respond to prompts and train nothing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from distillm_ray.cluster import placement
from distillm_ray.cluster.connection import available, connect, resolve_device
from distillm_ray.cluster.placement import Phase
from distillm_ray.config import Config, ModelConfig, RemotePath
from distillm_ray.data import partial_responses, ray_data
from distillm_ray.data.files import check_files
from distillm_ray.data.partial_responses import PartialResponses
from distillm_ray.data.response_rows import response_row
from distillm_ray.data.splits import Dataset, load_dataset, splits_of
from distillm_ray.data.template_difference import template_difference
from distillm_ray.data.templates import Renderer
from distillm_ray.errors import DataError, RunDirectoryError
from distillm_ray.evaluation.model_scores import evaluation_seeds, score_model, served_student
from distillm_ray.evaluation.responder import Responder, ServedModel, serving
from distillm_ray.evaluation.responses_file import write_responses
from distillm_ray.evaluation.results import Evaluation
from distillm_ray.files import check_writable
from distillm_ray.models.completeness import check_complete
from distillm_ray.models.directory import ModelFacts, check_context, check_model_directory
from distillm_ray.models.identity import model_identity
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.preflight import check_engines
from distillm_ray.remote.inputs import fetched
from distillm_ray.report.console import ConsoleView, duration
from distillm_ray.report.scores_table import scores_table
from distillm_ray.run_directory import MODEL_FOLDER
from distillm_ray.types import Device, Prompt, Source


def evaluate(config: Config, model: Path | None, output: Path | None, view: ConsoleView) -> Table:
    """Score a model on the config's test split, or on the validation split without one.

    Writes the same JSON as the end of a run does, and the responses; returns the table.

    Raises:
        UserError: the model or the data cannot be used.
    """
    directory = model or config.run.below(MODEL_FOLDER)
    if isinstance(directory, Path) and model is None and not directory.exists():
        raise RunDirectoryError(
            f"{config.run.directory} has no {MODEL_FOLDER}/, which a finished run leaves: run"
            " `distillm-ray train` to its end first, or name a model with --model"
        )
    if output is not None:
        check_writable(output, "--output")
    check_engines({"evaluation.student": config.evaluation.student})
    facts = _check(config, directory, config.longest_response)
    check_files(config.data, require_responses=config.draws_data, with_corpus=False)
    device = _connect(config, placement.evaluate_phases, view)
    tokenizer = _tokenizer(facts.path, config)
    view.start("reading data")
    splits = splits_of(
        config,
        tokenizer,
        map_files=ray_data.mapper(stall_timeout_s=config.run.startup_timeout_s),
        vocabulary_size=facts.vocabulary_size,
        with_corpus=False,
    )
    test = splits.test or splits.validation
    answered = (prompt for prompt in test.prompts if prompt.references)
    prompts = tuple(islice(answered, config.evaluation.max_prompts))
    if not prompts:
        raise DataError(
            f"data.{test.split}: no row has a response, so there is nothing to compare the model's"
            " with; name files with responses in data.test"
        )
    view.start(f"responding to {len(prompts)} prompts")
    scores, responses = score_model(
        config,
        served_student(config, facts, device),
        prompts,
        tuple(splits.validation.demonstrations[: config.validation.max_prompts]),
        device=device,
        tokenizer=tokenizer,
        end_token_id=test.end_token_id,
        interrupt=view.tick,
    )
    evaluation = Evaluation(
        models={str(directory): scores}, num_prompts=len(prompts), seeds=evaluation_seeds(config)
    )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        evaluation.write(output)
        write_responses(output / "responses.jsonl", prompts, responses, evaluation.seeds)
    return scores_table(evaluation.models)


def generate(
    config: Config,
    model: Path,
    prompt_files: Sequence[Path],
    output: Path,
    keep_truncated: bool,
    view: ConsoleView,
) -> list[str]:
    """Respond to prompts with `model` under `generate.sampling`; one JSONL row each, in order.

    Each row has the prompt's id, the prompt in the columns that it came in, the response, and why
    it ended: `distillm-ray train` renders it to the tokens that the model saw. Returns a summary.

    Responses are kept beside `output` as they end, and `output` appears when all have. The same
    command goes on where it was interrupted.

    Raises:
        UserError: the model or the prompts cannot be used, `output` exists, or it was begun with
            other settings.
    """
    if output.exists():
        raise DataError(f"--output {output} exists and is not overwritten; remove it first")
    check_writable(output.parent, "--output")
    for path in prompt_files:
        if not path.exists():
            raise DataError(f"--prompts {path} does not exist")
    check_engines({"generate": config.generate})
    sampling = config.generate.sampling
    facts = _check(config, model, sampling.limit)
    tokenizer = _tokenizer(model, config)
    renderer = Renderer(tokenizer, config.data, vocabulary_size=facts.vocabulary_size)
    if renderer.writes_date and config.data.time is None:
        raise DataError(
            f"data.time is required, because the chat template of {model} writes the date into"
            " every prompt, and training must see the prompts as the model does: set it here and"
            f" in the training, as in data.time={datetime.now():%Y-%m-%d}"
        )
    device = _connect(config, placement.generate_phases, view)
    view.start("reading prompts")
    dataset = load_dataset(
        prompt_files,
        config.data,
        tokenizer,
        split="test",
        responses_needed_by=None,
        map_files=ray_data.mapper(stall_timeout_s=config.run.startup_timeout_s),
        vocabulary_size=facts.vocabulary_size,
    )
    if warning := _student_difference(config, model, dataset.prompts[0], tokenizer):
        view.note(warning)
    output.parent.mkdir(parents=True, exist_ok=True)
    with partial_responses.held(output, _settings(config, model, dataset)) as partial:
        if partial.num_damaged:
            view.note(f"{partial.path}: {partial.num_damaged} damaged lines are left out")
        if partial.done:
            view.note(
                f"{partial.path} has {len(partial.done):,} of {len(dataset.prompts):,} responses;"
                " going on with the others"
            )
        if len(partial.done) < len(dataset.prompts):
            served = ServedModel(
                facts=facts,
                model=ModelConfig(model=model, trust_remote_code=config.student.trust_remote_code),
                source=Source.TEACHER,
                spec=placement.generation(config, device),
                pool=config.generate,
            )
            view.start("starting generators")
            with serving(
                config,
                served,
                sampling,
                device=device,
                tokenizer=tokenizer,
                end_token_id=dataset.end_token_id,
                interrupt=view.tick,
            ) as responder:
                _respond(config, dataset, partial, responder, renderer, view)
        counts = partial.finish(
            [prompt.prompt_id for prompt in dataset.prompts], keep_truncated=keep_truncated
        )
        lines = counts.summary()
        if not counts.written:
            hint = ""
            if counts.left_out["truncated"]:
                hint = (
                    "; keep what was cut off with --keep-truncated, or remove"
                    f" {partial.path} and raise generate.sampling.max_tokens, now {sampling.limit}"
                )
            raise DataError(f"--output {output} was not written: {'; '.join(lines)}{hint}")
    return [f"{output}: {lines[0]}", *lines[1:]]


def _respond(
    config: Config,
    dataset: Dataset,
    partial: PartialResponses,
    responder: Responder,
    renderer: Renderer,
    view: ConsoleView,
) -> None:
    """Respond to the prompts without a response, and keep each response when it ends."""
    num_prompts, num_before = len(dataset.prompts), len(partial.done)
    view.start(f"responding to {num_prompts - num_before:,} prompts")
    numbers = {
        prompt.prompt_id: number
        for number, prompt in enumerate(dataset.prompts)
        if prompt.prompt_id not in partial.done
    }
    missing = (prompt for prompt in dataset.prompts if prompt.prompt_id in numbers)
    started, done, num_tokens = time.monotonic(), num_before, 0
    for responses in responder.stream(missing, config.generate.sampling, config.run.seed):
        partial.add(
            [
                response_row(
                    dataset.columns[numbers[response.prompt_id]],
                    response,
                    renderer=renderer,
                    tokenizer=responder.tokenizer,
                    names=config.data.columns,
                )
                for response in responses
            ]
        )
        done += len(responses)
        num_tokens += sum(len(response.response_ids) for response in responses)
        seconds = time.monotonic() - started
        view.progress(
            *(done, num_prompts, "prompts"),
            pace=pace(done - num_before, num_prompts - done, num_tokens, seconds),
        )


def pace(ended: int, left: int, num_tokens: int, seconds: float) -> str:
    """How fast responses come, and how long the rest will take at that rate."""
    text = f"{ended / seconds:.1f} prompts and {num_tokens / seconds:,.0f} tokens a second"
    return text + (f", about {duration(left * seconds / ended)} left" if left else "")


def _settings(config: Config, model: Path, dataset: Dataset) -> dict[str, Any]:
    """All that responses and their rows depend on, besides the noise of an engine's batches."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt, own in zip(dataset.prompts, dataset.columns, strict=True):
        digest.update(json.dumps([prompt.prompt_id, prompt.token_ids.tolist(), own]).encode())
    data = config.data.model_dump(
        mode="json", include={"columns", "template", "time", "reasoning", "conversations"}
    )
    return {
        "digest of the model": model_identity(model),
        "number of prompts": len(dataset.prompts),
        "digest of the prompts": digest.hexdigest(),
        "run": {"seed": config.run.seed},
        "generate": {
            "dtype": config.generate.dtype,
            "sampling": config.generate.sampling.model_dump(mode="json"),
        },
        "data": data,
    }


def _student_difference(
    config: Config, model: Path, prompt: Prompt, tokenizer: PreTrainedTokenizerBase
) -> str:
    """A warning if the student of the config, which may be trained on the file, renders otherwise.

    Empty if they agree, or if there is no student yet.
    """
    student = fetched(config.student.model)
    if student == model or not (student / "tokenizer.json").is_file():
        return ""
    return template_difference(
        prompt, config.data, _tokenizer(student, config), tokenizer, name=str(model)
    )


def _tokenizer(directory: Path, config: Config) -> PreTrainedTokenizerBase:
    return load_tokenizer(directory, trust_remote_code=config.student.trust_remote_code)


def _check(config: Config, directory: Path | RemotePath, longest_response: int) -> ModelFacts:
    facts = check_model_directory(
        directory, "model", trust_remote_code=config.student.trust_remote_code
    )
    check_context(config.data.max_prompt_tokens, longest_response, facts)
    check_complete(facts, trust_remote_code=config.student.trust_remote_code)
    return facts


def _connect(
    config: Config, phases: Callable[[Config, Device], Sequence[Phase]], view: ConsoleView
) -> Device:
    """Connect to a cluster that can hold the phases; returns the device to run on."""
    view.start("connecting to Ray")
    connect(config)
    device = resolve_device(config)
    placement.check(phases(config, device), available())
    return device
