"""What each Ray Train worker runs: build one rank of the learner, then the train loop."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from distillm_ray.cluster.control import ControlClient
from distillm_ray.cluster.learner import LearnerJob, Links
from distillm_ray.cluster.learner_turn import OwnDevice, SharedDevice
from distillm_ray.cluster.orchestrator import turn_limit_s

if TYPE_CHECKING:
    import torch


def run(job: LearnerJob) -> None:
    """Train from the newest complete checkpoint, or from the beginning, to the end or a stop."""
    # Imported in the worker: the driver, which imports this module, loads no DeepSpeed.
    import torch  # noqa: PLC0415

    from distillm_ray.batching import pack, plan_validation  # noqa: PLC0415
    from distillm_ray.cluster.actors import ask  # noqa: PLC0415
    from distillm_ray.config.files import dump_config  # noqa: PLC0415
    from distillm_ray.data.decoding import decode  # noqa: PLC0415
    from distillm_ray.learner.checkpoint import CheckpointDirectory  # noqa: PLC0415
    from distillm_ray.learner.learner import Learner  # noqa: PLC0415
    from distillm_ray.learner.offload import check_async_io, check_offload  # noqa: PLC0415
    from distillm_ray.learner.shared_directory import check_reached, check_shared  # noqa: PLC0415
    from distillm_ray.learner.teacher_head import teacher_head  # noqa: PLC0415
    from distillm_ray.learner.train_loop import TrainLoop  # noqa: PLC0415
    from distillm_ray.log.records import EventRecord  # noqa: PLC0415
    from distillm_ray.models.dtypes import resolve_dtype  # noqa: PLC0415
    from distillm_ray.models.tokenizers import load_tokenizer  # noqa: PLC0415
    from distillm_ray.remote.inputs import fetched  # noqa: PLC0415
    from distillm_ray.remote.run_store import store_of  # noqa: PLC0415

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = job.config
    links = Links.over(job.wires, config)
    links.reporter.start(job.wires.log)
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    links = replace(links, turn=_turn(job, device))
    links.turn.take()
    check_offload(config.learner, job.device)
    if config.learner.offload_directory is not None:
        check_async_io(config.learner.offload_directory)
    learner = Learner(
        config.learner,
        config.student,
        config.loss,
        teacher_head=teacher_head(config, vocabulary_size=job.vocabulary_size, device=device),
        vocabulary_size=job.vocabulary_size,
        device=device,
        seed=config.run.seed,
        compare_engine=not config.mixes_teacher,
    )
    store = store_of(config)
    if store is None:
        check_shared(config.run.local_directory, learner, dump_config(config))
    else:
        check_reached(store, learner)
    held_out = ask(
        job.validation,
        "the held-out rows, which the driver's node has (run.startup_timeout_s)",
        timeout_s=config.run.startup_timeout_s,
    )
    plans = ((),) * learner.num_ranks
    if held_out:
        plans = plan_validation(
            held_out,
            num_ranks=learner.num_ranks,
            max_micro_batch_tokens=config.learner.max_micro_batch_tokens,
        )
    checkpoints = CheckpointDirectory.of(config, lease=job.lease)
    # One rank looks, so that all resume from the same checkpoint.
    (start, *_) = learner.collect(checkpoints.latest() if learner.rank == 0 else None)
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    for damage in checkpoints.damaged() if learner.rank == 0 else ():
        detail = f"{damage}; the run goes on from {start.path.name if start else 'the beginning'}"
        links.log.add(EventRecord(name="damaged checkpoint", detail=detail))
    loop = TrainLoop(
        learner,
        links,
        config,
        checkpoints,
        validation_batches=[pack(plan, None) for plan in plans[learner.rank]],
        publish_dtype=resolve_dtype(config.rollout.dtype, device),
        end_token_ids=job.end_token_ids,
        probe_prompts=job.probe_prompts,
        held_out_prompts=job.held_out_prompts,
        decode=partial(decode, tokenizer),
    )
    with links.reporter:
        loop.run(start)


def _turn(job: LearnerJob, device: torch.device) -> OwnDevice:
    """How this rank gets its device."""
    from ray.train import get_context  # noqa: PLC0415 (as in `run`)

    from distillm_ray.learner.shared_device import leave_room  # noqa: PLC0415

    if not job.config.is_colocated:
        return OwnDevice()
    part = job.config.learner.num_gpus
    assert part is not None, "the config fills it in"
    return SharedDevice(
        job.wires.orchestrator,
        ControlClient(job.wires.control),
        attempt=job.attempt,
        rank=get_context().get_world_rank(),
        limit_s=turn_limit_s(job.config, job.most_probes),
        free=partial(leave_room, device, part),
    )
