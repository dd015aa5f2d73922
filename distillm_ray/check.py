"""`distillm-ray check`: proves in a minute, in one process, what would otherwise fail in hours.

    config, models, files ──► three rows as the models see them ──► teacher and student on packed
    rows ──► the student, exported and loaded again ──► greedy responses of the engine

Every line that it prints is a fact with its number, so that the output can be pasted into a report.
"""

from __future__ import annotations

import asyncio
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from distillm_ray import __version__
from distillm_ray.config import Config, SamplingConfig
from distillm_ray.data.splits import Dataset, splits_of
from distillm_ray.data.tokenizing import map_files
from distillm_ray.errors import ModelError
from distillm_ray.log.commit import package_commit
from distillm_ray.models.directory import ModelFacts
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.models.logit_rules import logit_rule
from distillm_ray.models.packed import PackedModel, check_head, load_packed_model
from distillm_ray.models.row_path import tolerance_of
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.preflight import Preflight
from distillm_ray.remote.inputs import fetched
from distillm_ray.report.opening import opening_lines
from distillm_ray.report.rows import NUM_ROWS, describe_pieces, describe_rows
from distillm_ray.rollout.engines import make_generator
from distillm_ray.rollout.generator import student_job
from distillm_ray.types import Device, Prompt, Rollout
from distillm_ray.weights.export import export_model
from distillm_ray.weights.gather import gather

MAX_ROWS = 1000  # of each file that are read; `train` reads all
NUM_PROMPTS = 4  # that the engine responds to
MAX_TOKENS = 32  # of a response
_SHOWN_BYTES = 4000  # of an engine's output, if it fails
_PACKAGES = ("torch", "transformers", "deepspeed", "ray")

Say = Callable[[str], None]


def check(config: Config, preflight: Preflight, say: Say) -> None:
    """Print what was proven, line by line.

    Args:
        preflight: what `preflight.check` found for this config.
        say: prints one line or several.

    Raises:
        UserError: the first thing that cannot work; the lines before it were printed.
    """
    device: Device = "cuda" if config.run.device != "cpu" and torch.cuda.is_available() else "cpu"
    commit = package_commit()
    say(f"distillm-ray {__version__}{f' ({commit})' if commit else ''}, {platform.platform()}")
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    say(f"Python {platform.python_version()}, {packages}, on {device}")
    for facts in (preflight.teacher, preflight.student):
        if facts is not None:
            say(describe_model(facts))

    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    splits = splits_of(
        config,
        tokenizer,
        map_files=partial(map_files, max_rows=MAX_ROWS),
        vocabulary_size=preflight.vocabulary_size,
    )
    config = config.with_rows(len(splits.train.prompts))
    train = splits.train
    say(f"\ndata; read were at most {MAX_ROWS:,} rows of each file")
    for line in opening_lines(config, splits, tokenizer):
        say(line)
    ends = preflight.student.ends(train.end_token_id)
    say(f"\nthe first {min(NUM_ROWS, len(train.prompts))} rows")
    say(describe_rows(train.rows[:NUM_ROWS], tokenizer, ends))
    if splits.corpus is not None:
        say(f"\nthe first {min(NUM_ROWS, len(splits.corpus.pieces))} pieces of the corpus")
        say(describe_pieces(splits.corpus, tokenizer))
    if config.teacher is not None:
        say(compare_tokenizers(config, train.rows[:NUM_ROWS], tokenizer))

    say("\npacked rows")
    if config.teacher is not None and config.loss.needs_teacher:
        say(check_teacher(config, preflight.vocabulary_size, torch.device(device)))
    student = load_packed_model(
        fetched(config.student.model),
        role="student",
        dtype=resolve_dtype(config.student.dtype, device),
        device=torch.device(device),
        trust_remote_code=config.student.trust_remote_code,
    )
    head = own_head(student.model, preflight.vocabulary_size)
    error = check_head(student.model, head, role="student")
    say(f"student: {describe_packed(student, error)}")

    say("\nexport")
    say(check_export(config, student, ends))

    if config.wants_generators:
        say(f"\ngreedy responses of {config.rollout.engine.type}")
        prompts = train.prompts[:NUM_PROMPTS]
        say(compare_responses(config, preflight, student, head, train, prompts, tokenizer, device))


def describe_model(facts: ModelFacts) -> str:
    """One line on a model directory."""
    ends = ", ".join(f"{index} {facts.tokens.get(index)!r}" for index in facts.end_token_ids)
    return (
        f"{facts.role}: {facts.architecture}, {facts.num_parameters / 1e6:,.1f} M parameters,"
        f" {facts.num_layers} layers, {facts.vocabulary_size:,} ids in {facts.num_rows:,} rows,"
        f" context {facts.context_length or 'unlimited'}, head {facts.head_rule.name},"
        f" end tokens {ends}"
    )


def compare_tokenizers(
    config: Config,
    rows: Sequence[Rollout] | Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """Whether the teacher's tokenizer reads the student's rows as the same ids."""
    assert config.teacher is not None
    teacher = load_tokenizer(
        fetched(config.teacher.model), trust_remote_code=config.teacher.trust_remote_code
    )
    for row in rows:
        if isinstance(row, Prompt):
            ids = row.token_ids.tolist()
        else:
            ids = [*row.prompt_ids.tolist(), *row.response_ids.tolist()]
        text = tokenizer.decode(ids, skip_special_tokens=False)
        theirs = teacher(text, add_special_tokens=False, verbose=False)["input_ids"]
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if theirs != ours:
            return (
                f"teacher: its tokenizer splits the text of {row.prompt_id} differently from the"
                " student's; both models get the student's ids"
            )
    return "teacher: its tokenizer gives the same ids"


def check_teacher(config: Config, vocabulary_size: int, device: torch.device) -> str:
    """Load the teacher as a scorer does; one line."""
    assert config.teacher is not None
    dtype = resolve_dtype(config.teacher.dtype, device)
    packed = load_packed_model(
        fetched(config.teacher.model),
        role="teacher",
        dtype=dtype,
        device=device,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    head = load_frozen_head(
        fetched(config.teacher.model),
        vocabulary_size=vocabulary_size,
        dtype=dtype,
        device=device,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    return f"teacher: {describe_packed(packed, check_head(packed.model, head, role='teacher'))}"


def describe_packed(packed: PackedModel, head_error: float) -> str:
    """How a model runs packed rows, and what was measured."""
    proof = packed.path.proof
    assert proof is not None
    eager = "" if proof.from_eager is None else f", eager {proof.from_eager:.1e}"
    gradients = "" if proof.gradients is None else f", gradients {proof.gradients:.1e}"
    return (
        f"{packed.path.describe}; {str(packed.model.dtype).removeprefix('torch.')}; differs from"
        f" each sequence alone by {proof.from_alone:.1e}{eager}{gradients} (rounding: up to"
        f" {tolerance_of(packed.model.dtype):g}); head from logits {head_error:.1e}"
    )


def own_head(model: PreTrainedModel, vocabulary_size: int) -> FrozenHead:
    """The output head of a loaded model, without its padding.

    Raises:
        ModelError: it is not a linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"student.model: the output head of {type(model).__name__} must be a linear layer, got"
            f" a {type(head).__name__}: the fused loss cannot replace it; use another model"
        )
    bias = None if head.bias is None else head.bias.detach()[:vocabulary_size]
    weight = head.weight.detach()[:vocabulary_size]
    return FrozenHead(weight_VD=weight, bias_V=bias, rule=logit_rule(model.config.to_dict()))


@torch.no_grad()
def check_export(config: Config, student: PackedModel, end_token_ids: tuple[int, ...]) -> str:
    """Export the student as it is and load it in plain transformers; one line.

    Raises:
        ModelError: the loaded model gives other logits.
    """
    model = student.model
    ids_1L = torch.arange(8, device=model.device)[None]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        weights = gather(model, model.dtype, keep=True)
        source = fetched(config.student.model)
        export_model(weights, source, directory, model.dtype, end_token_ids=end_token_ids)
        own, loaded = (
            AutoModelForCausalLM.from_pretrained(
                path,
                dtype=model.dtype,
                local_files_only=True,
                trust_remote_code=config.student.trust_remote_code,
            )
            for path in (source, directory)
        )
    expected, found = (
        nn.Module.to(one, model.device).eval()(input_ids=ids_1L).logits for one in (own, loaded)
    )
    apart = ((found - expected).norm() / expected.norm()).item()
    if not apart <= 1e-6:
        raise ModelError(
            f"student.model: an export of {type(model).__name__} must give the logits of the model"
            f" itself, but they differ by {apart:.1e}: a tensor was lost or renamed, and the"
            " trained model would be damaged; use another model"
        )
    return (
        f"student: loaded again in transformers, logits differ by {apart:.1e}; ends at"
        f" {loaded.generation_config.eos_token_id}"
    )


def compare_responses(
    config: Config,
    preflight: Preflight,
    student: PackedModel,
    head: FrozenHead,
    train: Dataset,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    device: Device,
) -> str:
    """Greedy responses of the engine, judged by the learner's model; one line a prompt."""
    job = student_job(config, preflight.student, end_token_id=train.end_token_id, device=device)
    limit = min(MAX_TOKENS, config.rollout.sampling.limit)
    sampling = SamplingConfig(temperature=0.0, max_tokens=limit)

    async def respond() -> list[Rollout]:
        generator = make_generator(config.rollout, job)
        await generator.start()
        try:
            return await asyncio.gather(
                *(generator.complete(prompt, sampling, seed=0) for prompt in prompts)
            )
        finally:
            await generator.stop()

    with _engine_output():
        responses = asyncio.run(respond())
    lines, gaps, agreed, total = [], [], 0, 0
    for response in responses:
        log_probs_TV = _log_probs(student, head, response)
        ids_T = torch.from_numpy(response.response_ids).long()
        agreed += int((log_probs_TV.argmax(-1) == ids_T).sum())
        total += len(ids_T)
        assert response.logprobs is not None
        learner_T = log_probs_TV.gather(-1, ids_T[:, None])[:, 0].numpy()
        gaps.append(np.abs(learner_T - response.logprobs))
        text = tokenizer.decode(response.response_ids.tolist(), skip_special_tokens=False)
        lines.append(f"{response.prompt_id}: {response.finish_reason}, {text!r}")
    gap = float(np.concatenate(gaps).mean())
    verdict = (
        f"{agreed} of {total} tokens are the learner's most likely ones; log-probabilities differ"
        f" by {gap:.1e} nats on average"
    )
    if gap > config.rollout.logprob_warning:
        verdict += (
            f", more than rollout.logprob_warning = {config.rollout.logprob_warning:g}: engine and"
            " learner do not run the same model"
        )
    return "\n".join([*lines, verdict])


@contextmanager
def _engine_output() -> Iterator[None]:
    """Keep what an engine and its processes print off the screen; show its end if they fail."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
        for descriptor, _ in saved:
            os.dup2(file.fileno(), descriptor)
        try:
            yield
        except BaseException:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _SHOWN_BYTES))
            os.write(saved[1][1], file.read().encode())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in saved:
                os.dup2(copy, descriptor)
                os.close(copy)


@torch.no_grad()
def _log_probs(student: PackedModel, head: FrozenHead, response: Rollout) -> Tensor:
    """`[T, V]`, float32: the learner's distribution before each token of a response."""
    device = student.model.device
    ids = np.concatenate([response.prompt_ids, response.response_ids])
    ids_L = torch.from_numpy(ids).long().to(device)
    hidden_LD = student.forward(ids_L, torch.arange(len(ids), device=device))
    first = len(response.prompt_ids) - 1
    return head.logits(hidden_LD[first:-1]).log_softmax(-1).cpu()
