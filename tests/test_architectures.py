"""Every architecture on packed rows, as tests/architectures.py expects it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from distillm_ray.config import RolloutConfig, SamplingConfig, TransformersEngine
from distillm_ray.errors import ModelError
from distillm_ray.models.completeness import check_complete
from distillm_ray.models.directory import check_model_directory
from distillm_ray.models.heads import load_frozen_head
from distillm_ray.models.packed import PackedModel, check_head, load_packed_model
from distillm_ray.rollout.generator import GeneratorJob
from distillm_ray.rollout.transformers_engine import TransformersGenerator
from distillm_ray.types import Source
from distillm_ray.weights.buckets import read_tensors, to_tensors
from distillm_ray.weights.gather import gather
from tests import make
from tests.architectures import ARCHITECTURES, CONTEXT, NUM_ROWS, Architecture, table

VOCABULARY_SIZE = 60
LENGTHS = (6, 1, 30, 2, 9)
NAMES = [one.name for one in ARCHITECTURES]
ACCEPTED = [one for one in ARCHITECTURES if not one.refused]
REFUSED = [one for one in ARCHITECTURES if one.refused]
GENERATING = [one for one in ACCEPTED if one.transformers != "fails"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Loaded:
    directory: Path
    packed: PackedModel


def load(directory: Path) -> PackedModel:
    return load_packed_model(
        directory, role="student", dtype=torch.float32, device=torch.device("cpu")
    )


def save(one: Architecture, directory: Path) -> Path:
    """A model directory, with a tokenizer that has fewer ids than the model has rows."""
    model = one.build()
    assert type(model).__name__ == one.class_name
    model.save_pretrained(directory)
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # Qwen2's class adds the last one
    words = [f"w{index}" for index in range(VOCABULARY_SIZE - len(special))]
    make.tokenizer(special, words).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    parent = tmp_path_factory.mktemp("models")
    made = {}
    for index, one in enumerate(ACCEPTED):
        directory = save(one, parent / str(index))
        made[one.name] = Loaded(directory=directory, packed=load(directory))
    return made


every = pytest.mark.parametrize("one", ACCEPTED, ids=[one.name for one in ACCEPTED])


@every
def test_the_directory_is_accepted(one: Architecture, loaded: dict[str, Loaded]) -> None:
    facts = check_model_directory(loaded[one.name].directory, "student")
    check_complete(facts)
    assert facts.architecture == one.class_name
    assert (facts.num_rows, facts.vocabulary_size) == (NUM_ROWS, VOCABULARY_SIZE)
    assert facts.end_token_ids == (2,)
    assert facts.num_layers == one.settings.get("num_layers", one.config.num_hidden_layers)
    if CONTEXT in one.settings.values():
        assert facts.context_length == CONTEXT


@every
def test_the_fastest_exact_way_is_chosen(one: Architecture, loaded: dict[str, Loaded]) -> None:
    path = loaded[one.name].packed.path
    assert (path.attention, path.packs_up_to) == (one.attention, one.packs_up_to)
    assert len(path.notes) == len(one.notes)
    for note, expected in zip(path.notes, one.notes, strict=True):
        assert expected in note


@pytest.mark.parametrize(
    "one", [one for one in ARCHITECTURES if one.refused], ids=lambda one: one.name
)
def test_a_model_whose_results_are_uncertain_is_refused(one: Architecture, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=one.refused):
        load(save(one, tmp_path))


@every
@torch.no_grad()
def test_the_logits_of_a_packed_row_are_those_of_each_sequence_alone(
    one: Architecture, loaded: dict[str, Loaded]
) -> None:
    packed = loaded[one.name].packed
    head = load_frozen_head(loaded[one.name].directory, vocabulary_size=NUM_ROWS)
    plain = plain_model(one)
    ids_L = torch.randint(3, NUM_ROWS, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    positions_L = torch.cat([torch.arange(length) for length in LENGTHS])
    found_LV = head.logits(packed.forward(ids_L, positions_L))
    expected_LV = torch.cat(
        [plain(input_ids=ids[None], use_cache=False).logits[0] for ids in ids_L.split(LENGTHS)]
    )
    assert relative_difference(found_LV, expected_LV) < 2e-5


@every
def test_the_output_head_is_the_one_that_the_directory_holds(
    one: Architecture, loaded: dict[str, Loaded]
) -> None:
    directory = loaded[one.name].directory
    head = load_frozen_head(directory, vocabulary_size=VOCABULARY_SIZE)
    check_head(loaded[one.name].packed.model, head, role="teacher")


@every
def test_gathered_weights_have_the_names_and_values_of_the_checkpoint(
    one: Architecture, loaded: dict[str, Loaded]
) -> None:
    found = {}
    for bucket in gather(loaded[one.name].packed.model, torch.float32, keep=True):
        found |= dict(to_tensors(bucket))
    saved = dict(read_tensors(loaded[one.name].directory))
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("one", GENERATING, ids=[one.name for one in GENERATING])
async def test_the_transformers_engine_generates_what_the_model_says(
    one: Architecture, loaded: dict[str, Loaded]
) -> None:
    generator = TransformersGenerator(
        RolloutConfig(engine=TransformersEngine(), dtype="float32", num_threads=1),
        job(loaded[one.name].directory),
    )
    await generator.start()
    assert ("prompts of one length" in generator.remark) == (one.transformers == "one length")
    numbers = np.random.default_rng(0)
    prompts = [make.prompt(token_ids=numbers.integers(4, 60, length)) for length in (12, 3, 7)]
    greedy = SamplingConfig(temperature=0.0, max_tokens=6)
    responses = await asyncio.gather(
        *(generator.complete(prompt, greedy, seed=0) for prompt in prompts)
    )
    await generator.stop()
    plain = plain_model(one)
    for response in responses:
        token_ids = np.concatenate([response.prompt_ids, response.response_ids])
        with torch.no_grad():
            ids_1L = torch.from_numpy(token_ids).long()[None]
            logits_LV = plain(input_ids=ids_1L, use_cache=False).logits[0, :, :VOCABULARY_SIZE]
        log_probs_TV = logits_LV[len(response.prompt_ids) - 1 : -1].log_softmax(-1).numpy()
        assert response.logprobs is not None
        # Greedy choices: no other token is better by more than rounding.
        np.testing.assert_allclose(response.logprobs, log_probs_TV.max(-1), atol=1e-3)
        chosen_T = np.take_along_axis(log_probs_TV, response.response_ids[:, None], 1)[:, 0]
        np.testing.assert_allclose(response.logprobs, chosen_T, atol=1e-3)


def job(directory: Path) -> GeneratorJob:
    return GeneratorJob(
        model=directory,
        source=Source.STUDENT,
        sampling=SamplingConfig(),
        end_token_ids=(2,),
        vocabulary_size=VOCABULARY_SIZE,
        max_prompt_tokens=16,
        max_response_tokens=8,
        seed=0,
        device="cpu",
    )


def plain_model(one: Architecture) -> PreTrainedModel:
    """The model as transformers makes it, with the attention that computes every option."""
    model = one.build().eval()
    model.set_attn_implementation("eager")
    return model


def relative_difference(found_LV: Tensor, expected_LV: Tensor) -> float:
    return ((found_LV - expected_LV).norm() / expected_LV.norm()).item()


# ---- vLLM and the page ---------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_knows_the_architectures_that_the_page_names() -> None:
    code = (
        "import json; from vllm.model_executor.models.registry import ModelRegistry;"
        "print(json.dumps(list(ModelRegistry.get_supported_archs())))"
    )
    # A process of its own: vLLM changes logging, warnings and the environment.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known = set(json.loads(done.stdout.splitlines()[-1]))
    assert {one.name: one.vllm for one in ARCHITECTURES} == {
        one.name: one.class_name in known for one in ARCHITECTURES
    }


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_the_page_shows_the_table_of_these_tests() -> None:
    page = Path(__file__).parents[1] / "docs" / "architectures.md"
    assert table() in page.read_text(encoding="utf-8")
