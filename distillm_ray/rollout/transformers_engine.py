"""A generator around transformers' generate(), for machines without a vLLM build.

Queued requests run as one batch, padded on the left. A logits processor samples row by row, so each
request keeps its own seed and sampling parameters, and recording log-probabilities needs no
`[tokens, vocabulary]` matrix. Demanded responses may be sampled from a mixture with a teacher
(lockstep.py), which this process then holds as well; weight updates do not touch it.

Axes: B batch, P padded prompt, T response tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from distillm_ray.config import Dtype, SamplingConfig, TransformersEngine
from distillm_ray.dynamic_batching import DynamicBatcher
from distillm_ray.errors import ModelError
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.row_path import soft_cap_of
from distillm_ray.remote.inputs import fetched
from distillm_ray.rollout.generator import Generator, MixedTeacher, Request, Response
from distillm_ray.rollout.lockstep import Lockstep, mixture, next_log_probs
from distillm_ray.types import Bucket, FinishReason
from distillm_ray.weights.buckets import to_tensors

# Prompt lengths of the batch that is compared with each of its requests alone, and the largest
# difference of log-probabilities that counts as rounding.
CHECKED_LENGTHS = (29, 3, 7, 12)
CHECKED_TOKENS = 3
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 0.1}


class SamplingProcessor(LogitsProcessor):
    """Samples the next token of each row and masks all others, so that generate() picks it."""

    def __init__(
        self,
        requests: Sequence[Request],
        device: torch.device,
        vocabulary_size: int,
        teacher: Lockstep | None,
        sign: Callable[[], None],
    ) -> None:
        """`teacher` follows the same batch; None if the requests have no `teacher_mix`.

        `sign` is called with every token of the batch.
        """
        self._sign = sign
        self._requests = requests
        self._vocabulary_size = vocabulary_size
        self._teacher = teacher
        self._generators = [
            torch.Generator(device).manual_seed(request.seed) for request in requests
        ]
        self.tokens: list[Tensor] = []  # one [B] per step
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `[B, V]` in; 0 at the sampled tokens and -inf elsewhere out."""
        log_probs_BV = next_log_probs(scores, self._vocabulary_size)
        if self._teacher is not None:
            log_p_BV = self._teacher.log_probs(input_ids)
            log_probs_BV = mixture(log_p_BV, log_probs_BV, self._requests[0].teacher_mix)
        tokens_B1 = torch.stack(
            [
                sample(row_V, request.sampling, generator)
                for row_V, request, generator in zip(
                    log_probs_BV, self._requests, self._generators, strict=True
                )
            ]
        ).unsqueeze(1)
        self._sign()
        self.tokens.append(tokens_B1[:, 0])
        self.logprobs.append(log_probs_BV.gather(1, tokens_B1)[:, 0])
        return torch.full_like(scores, -math.inf).scatter(1, tokens_B1, 0.0)


def sample(log_probs_V: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """Sample one token id, a scalar: temperature first, then top-k, then top-p."""
    if sampling.temperature == 0.0:
        return log_probs_V.argmax()
    probabilities_V, ids_V = (
        (log_probs_V / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    )
    if sampling.top_k:
        probabilities_V = probabilities_V[: sampling.top_k]
        probabilities_V = probabilities_V / probabilities_V.sum()
    # A token stays if the probability mass before it is below top_p, so the first always stays.
    mass_before_V = probabilities_V.cumsum(dim=-1) - probabilities_V
    probabilities_V = probabilities_V * (mass_before_V < sampling.top_p)
    return ids_V[torch.multinomial(probabilities_V, 1, generator=generator)[0]]


def _difference(one: Response, other: Response) -> float:
    """Of the log-probabilities of two greedy responses, as long as their tokens are the same."""
    differences = []
    for index in range(min(len(one.token_ids), len(other.token_ids))):
        differences.append(abs(float(one.logprobs[index] - other.logprobs[index])))
        if one.token_ids[index] != other.token_ids[index]:  # the rest follows different texts
            break
    return max(differences)


def _tolerance(model: PreTrainedModel) -> float:
    return TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])


class TransformersGenerator(Generator):
    """Runs a Hugging Face model in this process, one batch at a time, in a thread."""

    _model: PreTrainedModel | None = None
    _teacher: PreTrainedModel | None = None
    _mixes_lengths = True  # whether prompts of different lengths may share a batch
    _batcher: DynamicBatcher[Request, Response]
    _loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        """Load the model; requests are accepted when this returns."""
        if self.job.device == "cpu":
            torch.set_num_threads(self.config.num_threads)
        self._loop = asyncio.get_running_loop()
        self._batcher = DynamicBatcher(self._generate, self._fits)
        job = self.job
        self._model = await asyncio.to_thread(
            self._loaded, fetched(job.model), self.config.dtype, job.trust_remote_code
        )
        models = [(self._model, 0.0)]
        if job.teacher is not None:
            self._teacher = await asyncio.to_thread(self._loaded_teacher, job.teacher)
            models.append((self._teacher, 1.0))  # the whole share: its own log-probabilities
        inexact = [
            type(model).__name__
            for model, share in models
            if not await asyncio.to_thread(self._padding_is_exact, model, share)
        ]
        self._mixes_lengths = not inexact
        if inexact:
            self.remark = (
                f"{' and '.join(inexact)}: a batch holds prompts of one length, because padding"
                " changes its responses"
            )
        self._batcher.start()

    def _loaded(self, directory: Path, dtype: Dtype, trust_remote_code: bool) -> PreTrainedModel:
        """A model with an attention that computes all that its config asks for."""
        shared = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        config = AutoConfig.from_pretrained(directory, **shared)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=resolve_dtype(dtype, self.job.device),
            attn_implementation=None if soft_cap_of(config) is None else "eager",
            use_safetensors=True,
            **shared,
        )
        # generate() takes unset parameters from the model's own config, a repetition penalty say.
        model.generation_config = GenerationConfig()
        return cast(Any, model).to(torch.device(self.job.device)).eval()

    def _loaded_teacher(self, teacher: MixedTeacher) -> PreTrainedModel:
        """The teacher, proven to give in lockstep what it gives alone.

        Raises:
            ModelError: it cannot be loaded, lacks ids of the vocabulary, or cannot follow.
        """
        try:
            model = self._loaded(fetched(teacher.model), teacher.dtype, teacher.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"teacher.model: {teacher.model} cannot be loaded: {error}") from error
        num_rows = model.config.get_text_config().vocab_size
        if num_rows < self.job.vocabulary_size:
            raise ModelError(
                f"teacher.model: the output head of {teacher.model} has {num_rows} rows, the"
                f" tokenizer has {self.job.vocabulary_size} ids: some ids would have no teacher"
                " probability"
            )
        requests = self._check_requests(teacher_mix=1.0)
        alone = self._responses(model, requests)
        try:
            followed = self._responses(self._student, requests, model)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, TypeError, AttributeError, ValueError) as error:
            reason = f"its forward pass fails: {type(error).__name__}: {error}"
        else:
            apart = [_difference(*pair) for pair in zip(alone, followed, strict=True)]
            if all(one <= _tolerance(model) for one in apart):  # NaN is refused as well
                return model
            reason = f"its log-probabilities change by {max(apart):.2g}"
        raise ModelError(
            f"teacher.model: {type(model).__name__} cannot follow another model's generation with"
            f" rollout.teacher_mix = {teacher.share:g}: {reason}; set rollout.teacher_mix=0, or use"
            " another teacher"
        )

    def _check_requests(self, *, teacher_mix: float) -> list[Request]:
        """Greedy requests of `CHECKED_LENGTHS` random tokens."""
        numbers = np.random.default_rng(0)
        return [
            Request(
                request_id=f"check-{length}",
                prompt_ids=numbers.integers(
                    self.job.vocabulary_size,
                    size=min(length, self.job.max_prompt_tokens),
                    dtype=np.int32,
                ),
                sampling=SamplingConfig(temperature=0.0),
                teacher_mix=teacher_mix,
                max_tokens=CHECKED_TOKENS,
                stop_token_ids=self.job.end_token_ids or (0,),
                seed=0,
                version=0,
            )
            for length in CHECKED_LENGTHS
        ]

    def _padding_is_exact(self, model: PreTrainedModel, teacher_mix: float) -> bool:
        """Whether a padded prompt has the log-probabilities of the prompt alone.

        Some models with a recurrence read the padding.

        Args:
            model: whose log-probabilities the mixture with `teacher_mix` gives.
        """
        requests = self._check_requests(teacher_mix=teacher_mix)
        together = self._generate(requests)
        alone = [self._generate([request])[0] for request in requests]
        return all(
            _difference(one, other) <= _tolerance(model)
            for one, other in zip(together, alone, strict=True)
        )

    async def stop(self) -> None:
        """Free the model after the running batch; queued requests are cancelled."""
        if self._model is not None:
            await self._batcher.stop()
            self._model = self._teacher = None

    async def _respond(self, request: Request) -> Response:
        assert self._model is not None, "call start() first"
        return await self._batcher.call(request)

    async def _load(self, buckets: Iterable[Bucket]) -> None:
        assert self._model is not None, "call start() first"
        tensors = await asyncio.to_thread(
            lambda: {name: tensor for bucket in buckets for name, tensor in to_tensors(bucket)}
        )
        # `from_pretrained` changes torch's default dtype meanwhile, which a batch would see.
        async with self._batcher.between_batches:
            # In place: a GPU never holds a second model.
            self._model.load_state_dict(self._converted(self._model, tensors))

    def _converted(self, model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights under the names and in the shapes of the modules, from the checkpoint's.

        Raises:
            ValueError: the weights are incomplete, or belong to another model.
        """
        try:
            # Typed as Any: the declared result leaves out the loading info.
            load: Any = type(model).from_pretrained
            loaded, found = load(
                None,
                config=model.config,
                state_dict=tensors,
                dtype=model.dtype,
                output_loading_info=True,
            )
        except RuntimeError as error:
            raise ValueError(f"the weights do not fit {self.job.model}: {error}") from error
        if found["unexpected_keys"]:
            raise ValueError(
                f"the weights hold {sorted(found['unexpected_keys'])[:3]}, which {self.job.model}"
                " does not have: they belong to another model"
            )
        if found["missing_keys"]:
            raise ValueError(
                f"the weights lack {sorted(found['missing_keys'])[:3]} of {self.job.model}: those"
                " tensors would keep their old values"
            )
        return loaded.state_dict()

    def _fits(self, batch: Sequence[Request], request: Request) -> bool:
        """Whether `request` may join: generate() takes one set of end tokens per batch.

        The teacher follows all rows of a batch or none. Prompts of different lengths are padded,
        which not every model supports.
        """
        engine_config = self.config.engine
        assert isinstance(engine_config, TransformersEngine)
        return (
            len(batch) < engine_config.max_batch_size
            and batch[0].stop_token_ids == request.stop_token_ids
            and batch[0].teacher_mix == request.teacher_mix
            and (self._mixes_lengths or len(batch[0].prompt_ids) == len(request.prompt_ids))
        )

    def _sign(self, requests: Sequence[Request]) -> None:
        """Called in the thread of the batch; the requests' own signs run in the event loop."""

        def sign() -> None:
            for request in requests:
                request.sign()

        self._loop.call_soon_threadsafe(sign)

    @property
    def _student(self) -> PreTrainedModel:
        assert self._model is not None, "call start() first"
        return self._model

    def _generate(self, requests: Sequence[Request]) -> list[Response]:
        """One batch, whose requests have the same `teacher_mix`."""
        teacher = self._teacher if requests[0].teacher_mix > 0.0 else None
        return self._responses(self._student, requests, teacher)

    @torch.inference_mode()
    def _responses(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        teacher: PreTrainedModel | None = None,
    ) -> list[Response]:
        longest = max(len(request.prompt_ids) for request in requests)
        stop_ids = list(requests[0].stop_token_ids)
        token_ids_BP = torch.full((len(requests), longest), stop_ids[0])
        mask_BP = torch.zeros_like(token_ids_BP)
        for row, request in enumerate(requests):
            length = len(request.prompt_ids)
            token_ids_BP[row, longest - length :] = torch.from_numpy(request.prompt_ids.copy())
            mask_BP[row, longest - length :] = 1
        device, vocabulary_size = model.device, self.job.vocabulary_size
        token_ids_BP, mask_BP = token_ids_BP.to(device), mask_BP.to(device)
        follower = None if teacher is None else Lockstep(teacher, mask_BP, vocabulary_size)
        processor = SamplingProcessor(
            requests, device, vocabulary_size, follower, lambda: self._sign(requests)
        )
        cast(Any, model).generate(
            inputs=token_ids_BP,
            attention_mask=mask_BP,
            generation_config=GenerationConfig(
                max_new_tokens=max(request.max_tokens for request in requests),
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=stop_ids[0],
            ),
            logits_processor=LogitsProcessorList([processor]),
        )
        tokens_BT = torch.stack(processor.tokens, dim=1).cpu().numpy().astype(np.int32)
        logprobs_BT = torch.stack(processor.logprobs, dim=1).cpu().numpy()
        responses = []
        for request, tokens_T, logprobs_T in zip(requests, tokens_BT, logprobs_BT, strict=True):
            ends = np.flatnonzero(np.isin(tokens_T[: request.max_tokens], stop_ids))
            length = int(ends[0]) + 1 if len(ends) else request.max_tokens
            assert length <= len(tokens_T), "generate() stopped before every row had ended"
            responses.append(
                Response(
                    token_ids=tokens_T[:length].copy(),
                    logprobs=logprobs_T[:length].copy(),
                    finish_reason=FinishReason.STOP if len(ends) else FinishReason.LENGTH,
                )
            )
        return responses
