"""A generator around transformers' generate(), for machines without a vLLM build.

Queued requests run as one batch, padded on the left. A logits processor samples row by row, so each
request keeps its own seed and sampling parameters, and recording log-probabilities needs no
`[tokens, vocabulary]` matrix.

Axes: B batch, P padded prompt, T response tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
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

from distillm_ray.config import SamplingConfig, TransformersEngine
from distillm_ray.dynamic_batching import DynamicBatcher
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.row_path import soft_cap_of
from distillm_ray.rollout.generator import Generator, Request, Response
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
        self, requests: Sequence[Request], device: torch.device, vocabulary_size: int
    ) -> None:
        self._requests = requests
        self._vocabulary_size = vocabulary_size
        self._generators = [
            torch.Generator(device).manual_seed(request.seed) for request in requests
        ]
        self.tokens: list[Tensor] = []  # one [B] per step
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits `[B, V]` in; 0 at the sampled tokens and -inf elsewhere out."""
        log_probs_BV = scores[:, : self._vocabulary_size].float().log_softmax(dim=-1)
        tokens_B1 = torch.stack(
            [
                sample(row_V, request.sampling, generator)
                for row_V, request, generator in zip(
                    log_probs_BV, self._requests, self._generators, strict=True
                )
            ]
        ).unsqueeze(1)
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


class TransformersGenerator(Generator):
    """Runs a Hugging Face model in this process, one batch at a time, in a thread."""

    _model: PreTrainedModel | None = None
    _mixes_lengths = True  # whether prompts of different lengths may share a batch
    _batcher: DynamicBatcher[Request, Response]

    async def start(self) -> None:
        """Load the model; requests are accepted when this returns."""
        if self.job.device == "cpu":
            torch.set_num_threads(self.config.num_threads)
        model = await asyncio.to_thread(self._loaded)
        # generate() takes unset parameters from the model's own config, a repetition penalty say.
        model.generation_config = GenerationConfig()
        self._model = cast(Any, model).to(torch.device(self.job.device)).eval()
        self._mixes_lengths = await asyncio.to_thread(self._padding_is_exact)
        if not self._mixes_lengths:
            self.remark = (
                f"{type(model).__name__}: a batch holds prompts of one length, because padding"
                " changes its responses"
            )
        self._batcher = DynamicBatcher(self._generate, self._fits)
        self._batcher.start()

    def _loaded(self) -> PreTrainedModel:
        """The model of the job, with an attention that computes all that its config asks for."""
        shared = {"trust_remote_code": self.job.trust_remote_code, "local_files_only": True}
        config = AutoConfig.from_pretrained(self.job.model, **shared)
        return AutoModelForCausalLM.from_pretrained(
            self.job.model,
            config=config,
            dtype=resolve_dtype(self.config.dtype, self.job.device),
            attn_implementation=None if soft_cap_of(config) is None else "eager",
            use_safetensors=True,
            **shared,
        )

    def _padding_is_exact(self) -> bool:
        """Whether a padded prompt has the log-probabilities of the prompt alone.

        Some models with a recurrence read the padding.
        """
        numbers = np.random.default_rng(0)
        requests = [
            Request(
                request_id=f"check-{length}",
                prompt_ids=numbers.integers(
                    self.job.vocabulary_size,
                    size=min(length, self.job.max_prompt_tokens),
                    dtype=np.int32,
                ),
                sampling=SamplingConfig(temperature=0.0),
                max_tokens=CHECKED_TOKENS,
                stop_token_ids=self.job.end_token_ids or (0,),
                seed=0,
                version=0,
            )
            for length in CHECKED_LENGTHS
        ]
        together = self._generate(requests)
        alone = [self._generate([request])[0] for request in requests]
        assert self._model is not None
        tolerance = TOLERANCES.get(self._model.dtype, TOLERANCES[torch.bfloat16])
        return all(
            _difference(one, other) <= tolerance for one, other in zip(together, alone, strict=True)
        )

    async def stop(self) -> None:
        """Free the model after the running batch; queued requests are cancelled."""
        if self._model is not None:
            await self._batcher.stop()
            self._model = None

    async def _respond(self, request: Request) -> Response:
        assert self._model is not None, "call start() first"
        return await self._batcher.call(request)

    async def _load(self, buckets: Sequence[Bucket]) -> None:
        assert self._model is not None, "call start() first"
        tensors = {name: tensor for bucket in buckets for name, tensor in to_tensors(bucket)}
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

        Prompts of different lengths are padded, which not every model supports.
        """
        engine_config = self.config.engine
        assert isinstance(engine_config, TransformersEngine)
        return (
            len(batch) < engine_config.max_batch_size
            and batch[0].stop_token_ids == request.stop_token_ids
            and (self._mixes_lengths or len(batch[0].prompt_ids) == len(request.prompt_ids))
        )

    @torch.inference_mode()
    def _generate(self, requests: Sequence[Request]) -> list[Response]:
        assert self._model is not None
        longest = max(len(request.prompt_ids) for request in requests)
        stop_ids = list(requests[0].stop_token_ids)
        token_ids_BP = torch.full((len(requests), longest), stop_ids[0])
        mask_BP = torch.zeros_like(token_ids_BP)
        for row, request in enumerate(requests):
            length = len(request.prompt_ids)
            token_ids_BP[row, longest - length :] = torch.from_numpy(request.prompt_ids.copy())
            mask_BP[row, longest - length :] = 1
        device = self._model.device
        processor = SamplingProcessor(requests, device, self.job.vocabulary_size)
        cast(Any, self._model).generate(
            inputs=token_ids_BP.to(device),
            attention_mask=mask_BP.to(device),
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
