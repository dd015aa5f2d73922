"""A generator around vLLM's AsyncLLM, on GPUs or on vLLM's CPU build.

vLLM runs its engine in a process of its own. This module submits requests and passes weights as
files in node-local memory, which vLLM's workers load with `reload_weights`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from distillm_ray.config import VllmEngine
from distillm_ray.directory_lock import locked
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.remote.inputs import fetched
from distillm_ray.rollout.engine_owner import own_engine
from distillm_ray.rollout.generator import Generator, Request, Response
from distillm_ray.types import Bucket, FinishReason
from distillm_ray.weights.buckets import write_buckets

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_WEIGHTS_PREFIX = "distillm-ray-weights-"
_TOKENS_PER_SIGN = 32  # of a request, after its first one
_YOUNG_S = 60.0  # the owner of a younger directory may not have locked it yet


def vllm_environment(*, device: str, num_threads: int) -> dict[str, str]:
    """Environment variables for vLLM; set them before importing it."""
    quiet = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if device != "cpu":
        return quiet
    return quiet | {
        # Several engines share the cores, so none pins its threads or waits by spinning.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        # Runs the worker inside the engine's process. As a third process it would poll shared
        # memory and use a quarter of a core while idle.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # vLLM compiles one small function even with enforce_eager (the rank of a log-probability),
        # which delays the first request by 10 s or more.
        "TORCH_COMPILE_DISABLE": "1",
    }


class VllmGenerator(Generator):
    """Runs the student, or the teacher, in vLLM's AsyncLLM."""

    _engine: AsyncLLM | None = None
    _serial: itertools.count[int]

    async def start(self) -> None:
        """Start the engine. Blocks the event loop meanwhile: 3 to 20 s on a CPU."""
        engine_config = self.config.engine
        assert isinstance(engine_config, VllmEngine)
        on_cpu = self.job.device == "cpu"
        num_threads = self.config.num_threads
        os.environ.update(vllm_environment(device=self.job.device, num_threads=num_threads))
        own_engine()
        remove_abandoned_weights(node_local_memory())
        # Imported here because vLLM reads its environment at import.
        from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: PLC0415
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415

        dtype = resolve_dtype(self.config.dtype, self.job.device)
        arguments = AsyncEngineArgs(
            model=str(fetched(self.job.model)),
            dtype="bfloat16" if dtype.itemsize == 2 else "float32",
            max_model_len=self.max_model_len,
            max_num_seqs=engine_config.max_num_seqs,
            tensor_parallel_size=self.config.tensor_parallel,
            gpu_memory_utilization=engine_config.gpu_memory_utilization,
            kv_cache_memory_bytes=engine_config.cpu_kv_cache_gib * 2**30 if on_cpu else None,
            enforce_eager=engine_config.enforce_eager or on_cpu,
            # vLLM's CPU build refuses it: an engine there only pauses, and keeps its memory.
            enable_sleep_mode=self.job.sleeps and not on_cpu,
            # A part of a prompt samples a token that vLLM takes back by rewinding the request's
            # random generator, which a CPU's cannot: the engine would die.
            enable_chunked_prefill=False if on_cpu else None,
            seed=self.job.seed % 2**31,
            load_format="safetensors",
            trust_remote_code=self.job.trust_remote_code,
            # Token ids in and out; end tokens and sampling come from our own config only.
            skip_tokenizer_init=True,
            generation_config="vllm",
            logprobs_mode="raw_logprobs",  # at temperature 1, before top-k and top-p
            disable_log_stats=True,
            worker_extension_cls="distillm_ray.rollout.vllm_worker.WorkerExtension",
        )
        self._serial = itertools.count()
        self._engine = AsyncLLM.from_engine_args(arguments)
        await self._engine.collective_rpc("limit_vocabulary", args=(self.job.vocabulary_size,))
        if on_cpu and self.config.tensor_parallel > 1:
            await self._engine.collective_rpc("unlink_shared_memory")

    async def stop(self) -> None:
        """Shut the engine down. Requests in flight fail."""
        if self._engine is not None:
            self._engine.shutdown(timeout=1.0)  # it holds no state that must be saved
            self._engine = None

    async def _respond(self, request: Request) -> Response:
        from vllm.inputs import tokens_input  # noqa: PLC0415 (`start` sets the environment first)
        from vllm.sampling_params import RequestOutputKind, SamplingParams  # noqa: PLC0415

        assert self._engine is not None, "call start() first"
        sampling = request.sampling
        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=request.max_tokens,
            seed=request.seed,
            stop_token_ids=list(request.stop_token_ids),
            logprobs=0,  # of the sampled token only
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            stream_interval=_TOKENS_PER_SIGN,
        )
        # The salt separates the prefix cache's blocks by weight version. vLLM refuses to reset the
        # cache while requests are in flight.
        prompt = tokens_input(request.prompt_ids.tolist(), cache_salt=str(request.version))
        # A retried ordinal may run beside its own earlier request, and vLLM wants unique ids.
        request_id = f"{request.request_id}-{next(self._serial)}"
        token_ids: list[int] = []
        logprobs: list[float] = []
        finish_reason: str | None = None
        async for part in self._engine.generate(prompt, parameters, request_id):
            request.sign()
            output = part.outputs[0]
            assert output.logprobs is not None
            token_ids += output.token_ids
            logprobs += [
                entry[token].logprob
                for entry, token in zip(output.logprobs, output.token_ids, strict=True)
                if entry is not None
            ]
            finish_reason = output.finish_reason
        if finish_reason not in tuple(FinishReason) or not token_ids:
            raise RuntimeError(
                f"{request.request_id}: vLLM ended the request with {finish_reason!r} after"
                f" {len(token_ids)} tokens"
            )
        return Response(
            token_ids=np.array(token_ids, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            finish_reason=FinishReason(finish_reason),
        )

    async def _load(self, buckets: Iterable[Bucket]) -> None:
        assert self._engine is not None, "call start() first"
        parent = tempfile.TemporaryDirectory(prefix=_WEIGHTS_PREFIX, dir=node_local_memory())
        with parent as name, locked(Path(name)):
            await asyncio.to_thread(write_buckets, buckets, Path(name))
            await self._engine.pause_generation(mode="keep", clear_cache=False)
            await self._engine.collective_rpc("take_weights", args=(name,))
            await self._engine.resume_generation()

    async def _sleep(self) -> None:
        # Level 1: the weights move to main memory and come back at the wake. Level 2 would drop
        # them, and the waking engine would need those that a learner has published, which may be
        # lost with it, or the disk.
        assert self._engine is not None, "call start() first"
        await self._engine.sleep(level=1)

    async def _wake(self) -> None:
        assert self._engine is not None, "call start() first"
        await self._engine.wake_up()


def node_local_memory() -> Path:
    """The shared-memory directory if the system has one, else the temporary directory."""
    shared_memory = Path("/dev/shm")
    return shared_memory if shared_memory.is_dir() else Path(tempfile.gettempdir())


def remove_abandoned_weights(parent: Path) -> None:
    """Delete weights left behind by killed generators, which would keep their memory.

    Directories that are locked (in use) or younger than `_YOUNG_S` stay.
    """
    for directory in parent.glob(f"{_WEIGHTS_PREFIX}*"):
        with suppress(OSError):  # owned by another user, or already deleted
            age_s = time.time() - directory.stat().st_mtime
            with locked(directory) as free:
                if free and age_s > _YOUNG_S:
                    shutil.rmtree(directory)
