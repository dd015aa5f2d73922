"""The algorithm on one page: the config of a distributed run, carried out by one process.

    distillm-ray train CONFIG run.mode=local

    ┌──────────────────────────── phi ◄──── adapt ◄──── validate ◄────┐
    ▼                                                                 │
    demand ──► generate (student) ──► draw ──► score (teacher) ──► learn (student)

No Ray, vLLM, DeepSpeed or actors: `distil` does one thing after the other, from top to bottom. It
is the place to start reading, to set a breakpoint, and to see what a distributed run must compute.
The parts that decide something (buffer, schedule, batching, loss) are those of the distributed run.
The comments say where the distributed run does the same work, at the same time as the other parts.

What is exact: for equal phi, slots, prompts and replayed sequences are those of the distributed
run. With greedy sampling, strictly on-policy (`rollout.max_staleness` 0) and without dropout,
responses, losses, phi and parameters are as well, up to the rounding of float32
(tests/integration/test_local.py). Otherwise responses may differ: sampling depends on the engine
and its batches, and with `rollout.lookahead` above 1 a distributed run may generate with newer
weights. Here the weights are always the oldest that `lookahead` and `sync_interval` allow.

What is left out: checkpoints, so that an interrupted run starts again; sample responses at
validations; the evaluation before and after training. Keys that divide work among processes have no
effect: `learner.zero_stage`, `num_cpus`, `num_gpus`, and `num_threads` of all roles but the
learner. `check` refuses what would change the result.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing

import psutil
import torch
from torch import nn

from distillm_ray.batching import draw_facts, pack, plan_step, plan_validation
from distillm_ray.config import ActorRange, Config, FilterConfig, LearnerConfig
from distillm_ray.config.files import dump_config
from distillm_ray.data.splits import Splits, splits_of
from distillm_ray.errors import ConfigError, RunDirectoryError, UserError
from distillm_ray.files import write_atomically
from distillm_ray.learner.held_out_loss import cross_entropy_sum, own_text_sum
from distillm_ray.learner.optimizer import build_optimizer, learning_rate_at
from distillm_ray.learner.self_check import describe_self_check, largest_self_divergence
from distillm_ray.learner.step_statistics import StepStatistics
from distillm_ray.learner.student_model import build_student, run_row, training_request
from distillm_ray.learner.teacher_head import teacher_head
from distillm_ray.log.commit import package_commit
from distillm_ray.log.health import HealthWatch
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import (
    ActorCounts,
    BufferSizes,
    Counters,
    DoneRecord,
    EventRecord,
    Record,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.log.stopping import ENDED_EARLY, Standing, why_stop
from distillm_ray.loss.curriculum import first_anchors, next_anchors
from distillm_ray.loss.terms import loss_at
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.preflight import Preflight, check_run_directory
from distillm_ray.remote.inputs import fetched
from distillm_ray.remote.run_store import store_of
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.build import build_buffer
from distillm_ray.report.console import ConsoleView
from distillm_ray.report.opening import opening_lines
from distillm_ray.report.rows import write_first_rows
from distillm_ray.rollout.generator import student_job
from distillm_ray.rollout.responses import MAX_REJECTED, response_counts, response_facts, verdict
from distillm_ray.rollout.transformers_engine import TransformersGenerator
from distillm_ray.run_directory import CONFIG_FILE, MODEL_FOLDER, held
from distillm_ray.teacher.scorer import Scorer
from distillm_ray.teacher.target_key import TargetIdentity, target_key
from distillm_ray.teacher.target_library import (
    NO_LIBRARY,
    TargetLibrary,
    is_shared,
    library_settings,
)
from distillm_ray.teacher.target_store import TargetStore, most_fetched
from distillm_ray.types import (
    TRAINING,
    Device,
    LearnerBatch,
    Prompt,
    Rollout,
    TeacherTargets,
    Validation,
    Weights,
)
from distillm_ray.weights.export import export_model
from distillm_ray.weights.gather import gather


def train(
    config: Config,
    preflight: Preflight,
    view: ConsoleView,
    *,
    command: str = "",
    store: TargetStore[TeacherTargets] | None = None,
) -> None:
    """Run the job; it leaves the log and `model/` in `run.directory`.

    Args:
        preflight: what `preflight.check` found for this config.
        store: teacher targets of earlier runs in this process, to be used and added to. None: an
            empty store of `targets.max_bytes`.

    Raises:
        UserError: the data or the run directory cannot be used, or the training diverged.
    """
    started = time.monotonic()
    directory = config.run.local_directory
    view.start("reading data")
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    splits = splits_of(
        config,
        tokenizer,
        vocabulary_size=preflight.vocabulary_size,
    )
    config = config.with_rows(len(splits.train.prompts))
    view.expect(config.learner.num_steps)
    for line in opening_lines(config, splits, tokenizer):
        view.note(line)
    directory.mkdir(parents=True, exist_ok=True)
    with held(directory):
        # Checked again: another job may have used the directory until now.
        check_run_directory(config)
        for line in check_start(config):
            view.note(line)
        write_atomically(directory / CONFIG_FILE, dump_config(config).encode())
        ends = preflight.student.ends(splits.train.end_token_id)
        for line in write_first_rows(directory, splits, tokenizer, ends):
            view.note(line)
        with (
            closing(MetricsLog(directory, commit=package_commit(), command=command)) as log,
            asyncio.Runner() as runner,
        ):

            def record(entry: Record) -> None:
                log.add(entry)
                view.update(entry)

            view.start(TRAINING)
            if store is None:
                limit = config.targets.max_bytes
                if limit == "auto":
                    limit = psutil.virtual_memory().available // 2
                store = TargetStore(limit, max_fetched=most_fetched(config))
            completed = distil(config, preflight, splits, store, record, runner)
            seconds = time.monotonic() - started
            record(DoneRecord(step=completed, status="complete", seconds=seconds))


def check_start(config: Config) -> list[str]:
    """A remark if an interrupted run starts again.

    Raises:
        RunDirectoryError: the directory holds a finished run, which would be replaced.
    """
    directory = config.run.local_directory
    store = store_of(config)  # whose models are not in the copy on this node
    exists = (directory / MODEL_FOLDER).exists() if store is None else store.files(MODEL_FOLDER)
    if exists:
        raise RunDirectoryError(
            f"run.directory: {config.run.directory} holds a finished run. With run.mode=local there"
            f" are no checkpoints to go on from: it would start again and replace {MODEL_FOLDER}/;"
            " set run.directory to a new directory"
        )
    if (directory / CONFIG_FILE).exists():
        return ["the run starts again: with run.mode=local there are no checkpoints to go on from"]
    return []


def distil(
    config: Config,
    preflight: Preflight,
    splits: Splits,
    store: TargetStore[TeacherTargets],
    record: Callable[[Record], None],
    runner: asyncio.Runner,
) -> int:
    """The algorithm, from the data to the trained model in `run.directory`; returns its steps.

    `runner` waits for generator and scorer, whose methods are coroutines because in a distributed
    run they serve many callers at the same time.
    """
    device_name = resolve_device(config)
    device = torch.device(device_name)
    vocabulary_size = preflight.vocabulary_size
    max_tokens = config.learner.max_micro_batch_tokens

    # ---- The parts ------------------------------------------------------------------------------

    # The student as the learner trains it. Its output head returns losses instead of logits, so
    # that no [tokens, vocabulary] matrix is ever made. Distributed: learner/learner.py.
    torch.manual_seed(config.run.seed)
    student = build_student(
        config.student,
        config.loss,
        vocabulary_size=vocabulary_size,
        device=device,
        zero_stage=0,
        activation_checkpointing=config.learner.activation_checkpointing,
    )
    if student.remark:
        record(EventRecord(name="student", detail=student.remark))
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(config.learner, parameters)

    # The student as it generates: a copy with the weights of the last publication.
    # With `rollout.teacher_mix` it holds a teacher of its own, which helps to sample every token.
    # Distributed: rollout/, in each of `rollout.actors` processes.
    generator = None
    if config.wants_rollouts:
        end_token_id = splits.train.end_token_id
        job = student_job(config, preflight.student, end_token_id=end_token_id, device=device_name)
        generator = TransformersGenerator(config.rollout, job)
        runner.run(generator.start())
        if generator.remark:
            record(EventRecord(name="generator", detail=generator.remark))

    # The frozen teacher. By default its targets are the last hidden states at the positions that
    # predict response tokens, and the learner applies a copy of its output head to them.
    # Distributed: teacher/, in each of `teacher.actors` processes.
    scorer = None
    identity = preflight.target_identity(config, device_name)
    if identity is not None:
        assert config.teacher is not None
        scorer = Scorer(
            config.teacher, config.targets, vocabulary_size=vocabulary_size, device=device
        )
        runner.run(scorer.start())

    # The library: targets on disk, from earlier runs and for later ones.
    # Distributed: behind each of `targets.stores` processes.
    settings = library_settings(config, identity)
    library = TargetLibrary(settings) if settings is not None else None
    frozen_head = teacher_head(config, vocabulary_size=vocabulary_size, device=device)
    if device.type == "cpu":
        torch.set_num_threads(config.learner.num_threads)

    # The replay buffer decides what every step trains on. Distributed: cluster/buffer.py.
    buffer = build_buffer(config, splits.to_draw_from())

    limit = config.validation.max_prompts
    validation_work: Counter[str] = Counter()  # since the last step
    standing, health = Standing(), HealthWatch()  # what ends a run, and what it is warned of

    def note(entry: Record) -> None:
        nonlocal standing, health
        record(entry)
        if isinstance(entry, StepRecord):
            health, warnings = health.after(entry)
            for warning in warnings:
                record(warning)
        standing = standing.plus(entry, metric="loss", min_improvement=config.stop.min_improvement)

    held_out = pack_held_out(splits.validation.demonstrations[:limit], None, max_tokens)

    def validate_and_adapt(completed: int) -> None:
        """phi, the share of student text, rises where the held-out loss does not improve."""
        started = time.monotonic()
        if held_out:
            total = cross_entropy_sum(student, held_out, device)
        else:
            total = loss_on_own_text(completed)
        loss_sum, num_tokens = total.tolist()
        loss = loss_sum / num_tokens if num_tokens else math.nan
        validation = Validation(step=completed, loss=loss, tokens=int(num_tokens))
        phi = buffer.report(validation).phi  # the rule is in replay/schedule.py
        seconds = time.monotonic() - started
        text = "dataset" if held_out else "student"
        facts = dataclasses.asdict(validation)
        note(ValidationRecord(**facts, text=text, phi=phi, seconds=seconds))

    def loss_on_own_text(completed: int) -> torch.Tensor:
        """Without held-out responses: the divergence on the student's, under its weights of now."""
        assert generator is not None
        publish(completed)
        prompts = splits.validation.prompts[:limit]
        responses, counts = runner.run(respond(prompts, generator, config))
        validation_work.update(counts)
        targets = None
        if scorer is not None and identity is not None:
            targets, counts = runner.run(targets_of(responses, scorer, identity, store, library))
            validation_work.update(counts)
        rows = pack_held_out(responses, targets, max_tokens)
        return own_text_sum(student, rows, config.loss, frozen_head, device)

    def warn_of(library: TargetLibrary | None) -> None:
        for warning in library.take_warnings() if library is not None else ():
            record(EventRecord(name="target library", detail=warning))

    def publish(completed: int) -> None:
        """Give the generator the student's weights. Distributed: learner/train_loop.py."""
        assert generator is not None
        if generator.version < completed:
            dtype = resolve_dtype(config.rollout.dtype, device)
            buckets = tuple(gather(student.model, dtype, keep=True))
            weights = Weights(version=completed, buckets=buckets, nbytes=0)  # none are sent
            runner.run(generator.update_weights(weights, keep_in_flight=False))

    # ---- The loop -------------------------------------------------------------------------------

    anchors = first_anchors(config.loss.terms)  # of curricula; distributed: in the checkpoint
    skipped_in_a_row = 0
    library_before = NO_LIBRARY
    actors = ActorCounts(generators=int(generator is not None), scorers=int(scorer is not None))
    completed = 0
    for step in range(config.learner.num_steps):
        if step % config.validation.interval == 0:
            validate_and_adapt(step)
        # Distributed: learner/train_loop.py, by the same rule.
        if config.stop.is_set and (rule := why_stop(config.stop, standing)):
            record(EventRecord(step=step, name=ENDED_EARLY, detail=rule))
            break
        started = time.monotonic()
        evictions = store.counters.evictions
        work = validation_work.copy()
        validation_work.clear()

        # Publish. The generator takes the student's weights every `sync_interval` steps, unless
        # nothing will be generated with them.
        interval = config.rollout.sync_interval
        due = step // interval * interval
        if generator is not None and buffer.wants_weights and generator.version < due:
            publish(step)
        published = time.monotonic()

        # Generate what the buffer demands: at each publication, the fresh responses of the
        # steps that its weights are meant for.
        # Distributed: cluster/orchestrator.py, while the learner is busy with earlier steps.
        if generator is not None:
            work += runner.run(meet_demand(buffer, generator, config.rollout.filter))
        generated = time.monotonic()

        # Draw. A slot of the batch takes a response of the student with probability phi: a fresh
        # one with probability psi (phi times the replay ratio), otherwise a replayed one. The other
        # slots take the next sequences of the data set, and a plain corpus adds its own. The
        # randomness depends on seed, step and slot alone. Every token then gets its weight in every
        # term of the loss, and the sequences are packed into rows. Distributed: the same, for all
        # ranks at once.
        draw = buffer.draw(step)
        loss = loss_at(config.loss, step, num_steps=config.learner.num_steps)
        plan = plan_step(draw, num_ranks=1, max_micro_batch_tokens=max_tokens, loss=loss)
        (micro_batches,) = plan.ranks

        # Score what neither store nor library holds. The teacher never changes, so a replayed
        # response, a later epoch of the data set, another run and an equal text cost it nothing.
        # Distributed: cluster/targets.py, ahead of the draw.
        targets = None
        if scorer is not None and identity is not None:
            drawn = [one.rollout for one in draw.sequences]
            rollouts = [one for one in drawn if config.loss.compares(one.source)]
            targets, counts = runner.run(targets_of(rollouts, scorer, identity, store, library))
            work += counts
        scored = time.monotonic()

        # Learn. The tokens' weights refer to the whole batch, so the loss is the sum over its rows.
        # Distributed: learner/learner.py, with DeepSpeed summing the ranks' gradients.
        learning_rate = learning_rate_at(step, config.learner)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if step == 0 and config.loss.needs_teacher:
            batches = [pack(one, targets) for one in micro_batches]
            first = next((one for one in batches if one.targets is not None), batches[0])
            largest = largest_self_divergence(student, first, config.loss, frozen_head, device)
            detail = describe_self_check(largest)
            record(EventRecord(step=0, name="self-check", detail=detail))
        student.train()
        statistics = StepStatistics(loss.terms, device, compare_engine=not config.mixes_teacher)
        for micro_batch in micro_batches:
            batch = pack(micro_batch, targets)
            request = training_request(batch, loss, frozen_head, device, anchors=anchors)
            result = run_row(student, batch, request, device)
            result.loss.backward()
            statistics.add(batch, result)
        totals = statistics.reduce(step + 1, wait_seconds=scored - started)
        anchors = next_anchors(anchors, loss.terms, statistics.gaps)
        norm = float(nn.utils.clip_grad_norm_(parameters, config.learner.max_gradient_norm))
        skipped = not (math.isfinite(totals.loss) and math.isfinite(norm))
        if not skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # Advance. The step's fresh responses can be replayed, and the demand of a later step opens.
        buffer.advance(step + 1)

        train_step = dataclasses.replace(
            totals,
            learning_rate=learning_rate,
            gradient_norm=norm,
            seconds=time.monotonic() - started,
            skipped=skipped,
        )
        library_now = library.counters if library is not None else NO_LIBRARY
        counters = Counters(
            **work,
            library_sequences=library_now.sequences - library_before.sequences,
            library_tokens=library_now.tokens - library_before.tokens,
            library_seconds=library_now.seconds - library_before.seconds,
            target_evictions=store.counters.evictions - evictions,
            sync_seconds=published - started,
            generate_seconds=generated - published,
            # Reading the library alone is no work of the teacher.
            score_seconds=scored - generated if work["scored_sequences"] else 0.0,
        )
        sizes = sizes_of(buffer, store)
        facts = draw_facts(plan, with_ids=config.run.log_rollout_ids)
        note(StepRecord.build(train_step, facts, buffer=sizes, work=counters, actors=actors))
        library_before = library_now
        warn_of(library)
        skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
        check_skips(skipped_in_a_row, step + 1, config.learner)
        completed = step + 1

    if completed % config.validation.interval or completed == config.learner.num_steps:
        validate_and_adapt(completed)
    if library is not None:
        library.close()
        warn_of(library)
    weights = gather(student.model, torch.float32, keep=True)
    export_model(
        weights,
        fetched(config.student.model),
        config.run.local_directory / MODEL_FOLDER,
        torch.float32,
        end_token_ids=preflight.student.ends(splits.train.end_token_id),
    )
    return completed


def pack_held_out(
    rollouts: Sequence[Rollout], targets: dict[str, TeacherTargets] | None, max_tokens: int
) -> list[LearnerBatch]:
    """Held-out sequences in rows, for one rank."""
    if not rollouts:
        return []
    (plans,) = plan_validation(rollouts, num_ranks=1, max_micro_batch_tokens=max_tokens)
    return [pack(plan, targets) for plan in plans]


async def respond(
    prompts: Sequence[Prompt], generator: TransformersGenerator, config: Config
) -> tuple[list[Rollout], Counter[str]]:
    """The student's responses to held-out prompts, and what to count."""
    sampling, seed = config.rollout.sampling, config.run.seed
    calls = [generator.complete(prompt, sampling, seed=seed) for prompt in prompts]
    responses = await asyncio.gather(*calls)
    counts: Counter[str] = Counter()
    for response in responses:
        counts.update(probe_sequences=1, probe_tokens=len(response.response_ids))
    return responses, counts


async def meet_demand(
    buffer: ReplayBuffer, generator: TransformersGenerator, response_filter: FilterConfig
) -> Counter[str]:
    """Generate all demanded responses; returns what to count.

    A response that the filter drops is demanded again, with another seed.
    """
    counts: Counter[str] = Counter()
    while demands := buffer.take_demand():
        # Made at the same time, the calls share batches.
        responses = await asyncio.gather(*(generator.generate(demand) for demand in demands))
        for demand, response in zip(demands, responses, strict=True):
            facts = response_facts(response)
            counts.update(response_counts(response, facts))
            if verdict(facts, response_filter) and demand.attempt < MAX_REJECTED:
                counts.update(dropped=1, lost=1)
                buffer.lose(demand.ordinal)
            else:
                buffer.add(response)
    return counts


async def targets_of(
    rollouts: Sequence[Rollout],
    scorer: Scorer,
    identity: TargetIdentity,
    store: TargetStore[TeacherTargets],
    library: TargetLibrary | None,
) -> tuple[dict[str, TeacherTargets], Counter[str]]:
    """The teacher targets of sequences by rollout id, and what to count.

    Targets are stored by a digest of teacher and sequence, so equal texts are scored once. The
    library counts for itself what it was asked for.
    """
    keys = {rollout.rollout_id: target_key(identity, rollout) for rollout in rollouts}
    by_key = {keys[rollout.rollout_id]: rollout for rollout in rollouts}
    found = store.get(by_key)
    if library is not None:
        for key in [key for key in by_key if key not in found]:
            if (scored := library.get(key, by_key[key].num_loss_tokens)) is not None:
                report, found[key] = scored
                store.put(key, found[key], report.nbytes, recurs=True)
    missing = [key for key in by_key if key not in found]
    scores = await asyncio.gather(*(scorer.score(by_key[key]) for key in missing))
    counts: Counter[str] = Counter()
    for key, (report, payload) in zip(missing, scores, strict=True):
        shared = is_shared(by_key[key])
        store.put(key, payload, report.nbytes, recurs=shared)
        if library is not None and shared:
            library.put(key, payload, report)
        found[key] = payload  # also if the store is too small to keep it
        counts.update(scored_sequences=1, scored_tokens=report.num_tokens)
    store.get(by_key)  # none of them waits for another reader
    return {rollout_id: found[key] for rollout_id, key in keys.items()}, counts


def sizes_of(buffer: ReplayBuffer, store: TargetStore[TeacherTargets]) -> BufferSizes:
    """What buffer and store hold now, for the log."""
    return BufferSizes(
        fresh=buffer.counters.fresh,
        replay=buffer.counters.replay,
        in_flight=buffer.counters.outstanding,
        target_bytes=store.counters.nbytes,
    )


def check_skips(in_a_row: int, completed: int, learner: LearnerConfig) -> None:
    """End a run whose updates are skipped again and again.

    Raises:
        UserError: more than `learner.max_skipped_steps` steps were skipped without one between.
    """
    if in_a_row > learner.max_skipped_steps:
        raise UserError(
            f"loss or gradient was not finite in {in_a_row} steps in a row, more than"
            f" learner.max_skipped_steps = {learner.max_skipped_steps}, the last one step"
            f" {completed}: the parameters stayed as they were before; lower"
            " learner.learning_rate"
        )


def resolve_device(config: Config) -> Device:
    """`run.device`; `auto` is the GPU where there is one."""
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def check(config: Config) -> None:
    """Refuse what one process does not do, before anything is loaded.

    Raises:
        ConfigError: with every such key and the value that it must have.
    """
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "run.device is cuda, but run.mode=local finds no GPU on this machine; set"
            " run.device=cpu, or run.mode=cluster"
        )
    one_copy = "one process holds one copy of the model"
    rules: list[tuple[str, object, object, str]] = [  # key, value, value that it must have, reason
        ("learner.workers", config.learner.workers, 1, "one process is one rank"),
        ("learner.offload", config.learner.offload, "none", "there is no DeepSpeed"),
        (
            "evaluation.at_end",
            config.evaluation.at_end,
            False,
            "evaluate model/ afterwards with `distillm-ray evaluate`",
        ),
        ("validation.metric", config.validation.metric, "loss", "no response is scored"),
        ("run.metrics_port", config.run.metrics_port, None, "metrics are exported by Ray"),
        ("checkpoint.at_best", config.checkpoint.at_best, False, "there are no checkpoints"),
    ]
    if config.wants_rollouts:
        rollout = config.rollout
        rules += [
            (
                "rollout.engine.type",
                rollout.engine.type,
                "transformers",
                "vLLM runs in processes of its own",
            ),
            ("rollout.actors", _as_written(rollout.actors), 1, one_copy),
            ("rollout.tensor_parallel", rollout.tensor_parallel, 1, one_copy),
        ]
    if config.teacher is not None and config.loss.needs_teacher:
        rules += [
            ("teacher.actors", _as_written(config.teacher.actors), 1, one_copy),
            ("teacher.tensor_parallel", config.teacher.tensor_parallel, 1, one_copy),
            ("targets.stores", config.targets.stores, 1, "one process has one store"),
        ]
    if resolve_dtype(config.student.dtype, resolve_device(config)) != torch.float32:
        reason = (
            "it is bfloat16 on this machine, and only DeepSpeed keeps the float32 copy of the"
            " weights that small updates need"
        )
        rules.append(("student.dtype", config.student.dtype, "float32", reason))
    broken = [rule for rule in rules if rule[1] != rule[2]]
    if not broken:
        return
    lines = [
        f"  {key} must be {_as_yaml(needed)}, got {_as_yaml(value)}: {reason}"
        for key, value, needed, reason in broken
    ]
    overrides = " ".join(f"{key}={_as_yaml(needed)}" for key, _, needed, _ in broken)
    raise ConfigError(
        "run.mode=local trains in one process, which cannot do all that this config asks for:\n"
        + "\n".join(lines)
        + f"\nAdd {overrides}, or set run.mode=cluster"
    )


def _as_written(actors: int | ActorRange) -> int | str:
    if isinstance(actors, ActorRange):
        return f"{{min: {actors.min}, max: {actors.max}}}"
    return actors


def _as_yaml(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
