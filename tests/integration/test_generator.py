"""Both engines on tiny models generate what the learner's model would generate.

Axes: T response tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from distillm_ray.config import (
    RolloutConfig,
    SamplingConfig,
    TransformersEngine,
    VllmEngine,
)
from distillm_ray.rollout.generator import Generator, GeneratorJob
from distillm_ray.rollout.transformers_engine import TransformersGenerator
from distillm_ray.rollout.vllm_engine import VllmGenerator
from distillm_ray.types import FinishReason, Prompt, Rollout, Source, Weights
from distillm_ray.weights.gather import gather
from tests import make

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:[Uu]nclosed:ResourceWarning"),  # vLLM leaves its sockets
]

Result = TypeVar("Result")

VOCABULARY_SIZE = 128
NUM_ROWS = 160  # of the head; without a mask its padding rows are as likely as any token
END_TOKENS = (5, 9)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)
LOOP = asyncio.new_event_loop()
VERSIONS = itertools.count(1)


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return LOOP.run_until_complete(asyncio.wait_for(work, 120))


def tiny_llama(seed: int) -> LlamaForCausalLM:
    return make.llama(
        seed=seed,
        vocab_size=NUM_ROWS,
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=512,
        initializer_range=0.2,  # spreads the logits, so that greedy choices are not near ties
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=list(END_TOKENS),
    ).eval()


def prompts(count: int) -> list[Prompt]:
    """Prompts that share a full cache block of vLLM's CPU backend, which is 128 tokens."""
    numbers = np.random.default_rng(0)
    shared = numbers.integers(10, VOCABULARY_SIZE, 130)
    return [
        make.prompt(
            f"p{index}",
            token_ids=np.concatenate([shared, numbers.integers(10, VOCABULARY_SIZE, 3 + index)]),
        )
        for index in range(count)
    ]


def to_weights(model: LlamaForCausalLM, version: int) -> Weights:
    """Two buckets, the tied head left out, as the learner publishes them."""
    entries = {
        name: (tuple(value.shape), "float32", value.numpy().reshape(-1).view(np.uint8))
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    names = sorted(entries)
    buckets = ({n: entries[n] for n in names[:5]}, {n: entries[n] for n in names[5:]})
    nbytes = sum(array.nbytes for _, _, array in entries.values())
    return make.weights(version, *buckets, nbytes=nbytes)


def job(model: Path, *, max_prompt_tokens: int, max_response_tokens: int) -> GeneratorJob:
    return GeneratorJob(
        model=model,
        source=Source.STUDENT,
        sampling=SamplingConfig(),
        end_token_ids=tuple(END_TOKENS),
        vocabulary_size=VOCABULARY_SIZE,
        max_prompt_tokens=max_prompt_tokens,
        max_response_tokens=max_response_tokens,
        seed=7,
        device="cpu",
    )


@pytest.fixture(scope="module", params=["vllm", "transformers"])
def generator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Generator]:
    directory: Path = tmp_path_factory.mktemp("model")
    model = tiny_llama(0)
    # Both engines must ignore sampling defaults of the model directory, as the learner does.
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(directory)
    engine = VllmEngine(max_num_seqs=8) if request.param == "vllm" else TransformersEngine()
    kind = VllmGenerator if request.param == "vllm" else TransformersGenerator
    made = kind(
        RolloutConfig(engine=engine, dtype="float32", num_threads=1, timeout_s=100),
        job(directory, max_prompt_tokens=160, max_response_tokens=96),
    )
    run(made.start())
    yield made
    run(made.stop())


def update(generator: Generator, model: LlamaForCausalLM, *, keep_in_flight: bool = True) -> int:
    version = next(VERSIONS)
    run(generator.update_weights(to_weights(model, version), keep_in_flight=keep_in_flight))
    return version


async def respond(
    generator: Generator, asked: Sequence[Prompt], sampling: SamplingConfig, seed: int = 0
) -> list[Rollout]:
    return await asyncio.gather(
        *(generator.complete(prompt, sampling, seed=seed) for prompt in asked)
    )


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: Prompt, max_tokens: int) -> list[int]:
    """Greedy decoding by transformers, one prompt at a time, in float32."""
    token_ids = torch.from_numpy(prompt.token_ids).long()[None]
    output = cast(Any, model).generate(
        inputs=token_ids,
        attention_mask=torch.ones_like(token_ids),
        generation_config=GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=list(END_TOKENS),
            pad_token_id=0,
            suppress_tokens=list(range(VOCABULARY_SIZE, NUM_ROWS)),
        ),
    )
    assert isinstance(output, torch.Tensor)
    return output[0, token_ids.shape[1] :].tolist()


@torch.inference_mode()
def logprobs_of(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Log-probabilities of the response, `[T]`, by one forward pass over prompt and response."""
    token_ids = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    logits_TV = model(torch.from_numpy(token_ids).long()[None]).logits[0, :, :VOCABULARY_SIZE]
    log_probs_TV = logits_TV[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
    return log_probs_TV.gather(1, torch.from_numpy(rollout.response_ids).long()[:, None])[:, 0]


def test_greedy_outputs_equal_the_learners_model_after_every_sync(
    generator: Generator,
) -> None:
    asked = prompts(6)
    for seed in (1, 2):
        model = tiny_llama(seed)
        version = update(generator, model)
        rollouts = run(respond(generator, asked, GREEDY))
        for prompt, rollout in zip(asked, rollouts, strict=True):
            assert rollout.response_ids.tolist() == greedy(model, prompt, 24)
            assert rollout.version == version
        assert len({tuple(rollout.response_ids.tolist()) for rollout in rollouts}) > 1


def test_log_probabilities_are_those_of_temperature_1_before_any_filter(
    generator: Generator,
) -> None:
    model = tiny_llama(3)
    update(generator, model)
    sampling = SamplingConfig(temperature=1.6, top_p=0.9, top_k=50, max_tokens=40)
    for rollout in run(respond(generator, prompts(4), sampling)):
        expected = logprobs_of(model, rollout)
        assert rollout.logprobs is not None
        torch.testing.assert_close(
            torch.from_numpy(rollout.logprobs), expected, atol=2e-4, rtol=1e-4
        )


def test_sampling_follows_the_models_distribution(generator: Generator) -> None:
    model = tiny_llama(4)
    update(generator, model)
    prompt = prompts(1)[0]
    sampling = SamplingConfig(max_tokens=1)

    async def first_tokens() -> list[int]:
        rollouts = await asyncio.gather(
            *(generator.complete(prompt, sampling, seed=seed) for seed in range(400))
        )
        return [int(rollout.response_ids[0]) for rollout in rollouts]

    counts = np.bincount(run(first_tokens()), minlength=VOCABULARY_SIZE)
    with torch.inference_mode():
        logits_V = model(torch.from_numpy(prompt.token_ids).long()[None]).logits[
            0, -1, :VOCABULARY_SIZE
        ]
    expected = logits_V.double().softmax(-1).numpy() * 400
    # The chi-squared test needs five expected counts a bin, so rarer ids share one bin.
    often = expected >= 5
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum())
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    assert freedom >= 1
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_any_of_several_end_tokens_ends_a_response_and_is_its_last_token(
    generator: Generator,
) -> None:
    update(generator, tiny_llama(5))
    stop = SamplingConfig(temperature=2.0, max_tokens=60, stop_token_ids=(17, 40, 77))
    ends = {*END_TOKENS, 17, 40, 77}
    rollouts = run(respond(generator, prompts(16), stop, seed=3))
    reasons = set()
    for rollout in rollouts:
        tokens = rollout.response_ids.tolist()
        assert not ends & set(tokens[:-1])
        assert (rollout.finish_reason is FinishReason.STOP) == (tokens[-1] in ends)
        if rollout.finish_reason is FinishReason.LENGTH:
            assert len(tokens) == 60
        reasons.add(rollout.finish_reason)
    assert FinishReason.STOP in reasons


def test_a_response_of_only_an_end_token_is_a_rollout_of_one_token(generator: Generator) -> None:
    model = tiny_llama(6)
    update(generator, model)
    prompt = prompts(1)[0]
    first = greedy(model, prompt, 1)[0]
    only_end = SamplingConfig(temperature=0.0, max_tokens=20, stop_token_ids=(first,))
    (rollout,) = run(respond(generator, [prompt], only_end))
    assert rollout.response_ids.tolist() == [first]
    assert rollout.finish_reason is FinishReason.STOP


def test_requests_in_flight_during_an_update_all_finish(generator: Generator) -> None:
    old_version = update(generator, tiny_llama(1))
    model = tiny_llama(2)
    version = next(VERSIONS)
    asked = prompts(12)
    demands = [make.demand(index, of=prompt) for index, prompt in enumerate(asked)]

    async def work() -> tuple[list[Rollout], Rollout]:
        running = [asyncio.create_task(generator.generate(demand)) for demand in demands]
        late = make.demand(99, of=asked[0], min_version=version)
        waiting = asyncio.create_task(generator.generate(late))
        await asyncio.sleep(0.02)
        await generator.update_weights(to_weights(model, version), keep_in_flight=True)
        return [await task for task in running], await waiting

    rollouts, late = run(work())
    assert [rollout.ordinal for rollout in rollouts] == list(range(12))
    assert {rollout.version for rollout in rollouts} == {old_version}
    assert late.version == version
    assert all(len(rollout.response_ids) >= 1 for rollout in rollouts)
    asked = prompts(3)
    for prompt, rollout in zip(asked, run(respond(generator, asked, GREEDY)), strict=True):
        assert rollout.response_ids.tolist() == greedy(model, prompt, 24)


def test_without_keeping_requests_in_flight_they_finish_with_the_old_weights(
    generator: Generator,
) -> None:
    old, new = tiny_llama(1), tiny_llama(2)
    update(generator, old)
    version = next(VERSIONS)
    asked = prompts(4)
    long_greedy = SamplingConfig(temperature=0.0, max_tokens=60)

    async def work() -> list[Rollout]:
        running = asyncio.create_task(respond(generator, asked, long_greedy))
        await asyncio.sleep(0.02)
        await generator.update_weights(to_weights(new, version), keep_in_flight=False)
        return await running

    for prompt, rollout in zip(asked, run(work()), strict=True):
        assert rollout.response_ids.tolist() == greedy(old, prompt, 60)
        assert rollout.version == version - 1


def test_vllm_that_has_slept_responds_with_its_newest_weights(generator: Generator) -> None:
    if not isinstance(generator, VllmGenerator):
        pytest.skip("the config refuses an engine that does not sleep")
    model = tiny_llama(12)
    update(generator, model)
    prompt = prompts(1)[0]

    async def sleep_meanwhile() -> tuple[bool, Rollout]:
        await generator.sleep()
        asked = asyncio.create_task(generator.complete(prompt, GREEDY, seed=0))
        await asyncio.sleep(0.3)
        early = asked.done()
        await generator.wake()
        return early, await asked

    early, rollout = run(sleep_meanwhile())
    assert not early
    assert rollout.response_ids.tolist() == greedy(model, prompt, 24)


def test_the_seed_is_a_function_of_run_ordinal_and_attempt(generator: Generator) -> None:
    update(generator, tiny_llama(3))
    prompt = prompts(1)[0]

    def tokens(ordinal: int, attempt: int) -> list[int]:
        demand = make.demand(ordinal, of=prompt, attempt=attempt)
        return run(generator.generate(demand)).response_ids.tolist()

    first = tokens(1, 0)
    assert tokens(1, 0) == first
    assert tokens(2, 0) != first
    assert tokens(1, 1) != first


def test_an_older_version_is_ignored(generator: Generator) -> None:
    version = update(generator, tiny_llama(4))
    stale = to_weights(tiny_llama(1), version - 1)
    assert run(generator.update_weights(stale, keep_in_flight=True)) == 0.0
    assert generator.version == version


# Sizes that vLLM's CPU kernels support. Its module names, those of transformers and those of the
# checkpoint all differ.
RENAMED: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {
        "head_dim": 32,
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_neox": {},
}


def renamed_model(model_type: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = make.SMALL | {
        "vocab_size": NUM_ROWS,
        "hidden_size": 64,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": list(END_TOKENS),
    }
    if model_type == "gpt_neox":
        del sizes["num_key_value_heads"]
    config = AutoConfig.for_model(model_type, **(sizes | RENAMED[model_type]))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", RENAMED)
@pytest.mark.parametrize("kind", [TransformersGenerator, VllmGenerator])
def test_published_weights_reach_a_model_whose_modules_have_other_names(
    kind: type[Generator], model_type: str, tmp_path: Path
) -> None:
    renamed_model(model_type, 0).save_pretrained(tmp_path)
    engine = VllmEngine() if kind is VllmGenerator else TransformersEngine()
    made = kind(
        RolloutConfig(engine=engine, dtype="float32", num_threads=1, timeout_s=100),
        job(tmp_path, max_prompt_tokens=160, max_response_tokens=96),
    )
    run(made.start())
    learned = renamed_model(model_type, 1)
    buckets = tuple(gather(learned, torch.float32, keep=True, bucket_elements=20_000))
    assert len(buckets) > 1
    run(made.update_weights(make.weights(1, *buckets), keep_in_flight=True))
    asked = prompts(3)
    rollouts = run(respond(made, asked, GREEDY))
    run(made.stop())
    for prompt, rollout in zip(asked, rollouts, strict=True):
        assert rollout.response_ids.tolist() == greedy(learned, prompt, 24)
        assert rollout.logprobs is not None
        torch.testing.assert_close(
            torch.from_numpy(rollout.logprobs), logprobs_of(learned, rollout), atol=2e-4, rtol=1e-4
        )


def test_weights_that_lack_a_tensor_are_refused_by_the_transformers_engine(tmp_path: Path) -> None:
    model = tiny_llama(0)
    model.save_pretrained(tmp_path)
    made = TransformersGenerator(
        RolloutConfig(engine=TransformersEngine(), dtype="float32", num_threads=1),
        job(tmp_path, max_prompt_tokens=16, max_response_tokens=16),
    )
    run(made.start())
    whole = to_weights(model, 1)
    first, _ = whole.buckets
    with pytest.raises(ValueError, match=r"the weights lack .* would keep their old values"):
        run(made.update_weights(replace(whole, buckets=(first,)), keep_in_flight=True))
    run(made.stop())


def test_more_prompt_tokens_than_one_pass_takes_do_not_end_the_engine(tmp_path: Path) -> None:
    """vLLM's pass takes 2,048 tokens. It used to split the prompt at the border."""
    model = tiny_llama(0)
    model.save_pretrained(tmp_path)
    numbers = np.random.default_rng(3)
    many = [
        make.prompt(f"p{index}", token_ids=numbers.integers(10, VOCABULARY_SIZE, 150))
        for index in range(32)
    ]
    engine = VllmGenerator(
        RolloutConfig(
            engine=VllmEngine(max_num_seqs=32), dtype="float32", num_threads=1, timeout_s=100
        ),
        job(tmp_path, max_prompt_tokens=160, max_response_tokens=96),
    )
    run(engine.start())
    try:
        sampling = SamplingConfig(max_tokens=4, stop_token_ids=())
        responses = run(respond(engine, many, sampling))
    finally:
        run(engine.stop())
    assert [one.prompt_id for one in responses] == [one.prompt_id for one in many]
    assert all(1 <= len(one.response_ids) <= 4 for one in responses)
