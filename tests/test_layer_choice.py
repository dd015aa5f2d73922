"""The layers that a student keeps, against students that are built and a computation by hand."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from typer.testing import CliRunner

from distillm_ray.cli import app
from distillm_ray.errors import ModelError
from distillm_ray.learner.layer_choice import LayerChooser, layers_of
from distillm_ray.models.students import init_student
from distillm_ray.types import Rollout, Source
from tests import make
from tests.integration.tiny import CHAT, END, SPECIAL, WORDS, make_rows

NUM_LAYERS = 5
ROWS = [
    make.rollout("a", prompt=[1, 5, 6], response=[7, 8, 3], source=Source.DATASET),
    make.rollout("b", prompt=[1, 9], response=[4, 5, 6, 3], source=Source.DATASET),
]


def make_teacher(directory: Path, name: str) -> Path:
    """Layers with different scales, so that their removal costs different amounts."""
    size = len(SPECIAL) + len(WORDS)
    torch.manual_seed(0)
    model: PreTrainedModel
    if name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size, n_embd=16, n_layer=NUM_LAYERS, n_head=2, n_positions=64,
                eos_token_id=3, bos_token_id=None,
            )
        )  # fmt: skip
    else:
        model = make.llama(vocab_size=size, num_hidden_layers=NUM_LAYERS, eos_token_id=3)
    with torch.no_grad():
        for index, layer in enumerate(layers_of(model, directory)):
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(1.0 + (7 * index) % NUM_LAYERS)
    model.save_pretrained(directory)
    make.tokenizer(SPECIAL, WORDS, end=END, chat_template=CHAT).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teachers") / request.param, request.param)


@pytest.fixture(scope="module")
def chooser(teacher: Path) -> LayerChooser:
    vocabulary_size = len(SPECIAL) + len(WORDS)
    return LayerChooser(teacher, ROWS, vocabulary_size=vocabulary_size, dtype="float32")


@torch.inference_mode()
def loss_of(directory: Path, rows: Sequence[Rollout] = ROWS) -> float:
    """The rows' cross-entropy in plain transformers, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids.tolist(), *row.response_ids.tolist()]])
        log_probs = model(ids).logits[0].log_softmax(-1)
        for position, label in enumerate(row.response_ids.tolist(), start=len(row.prompt_ids)):
            losses.append(-log_probs[position - 1, label])
    return float(torch.stack(losses).mean())


def test_the_loss_without_layers_is_that_of_a_student_without_them(
    teacher: Path, chooser: LayerChooser, tmp_path: Path
) -> None:
    assert chooser.loss() == pytest.approx(loss_of(teacher), rel=1e-5)
    for number, without in enumerate(((0,), (2,), (1, 4), (0, 2, 3))):
        kept = [layer for layer in range(NUM_LAYERS) if layer not in without]
        init_student(teacher, tmp_path / str(number), kept)
        assert chooser.loss(without) == pytest.approx(loss_of(tmp_path / str(number)), rel=1e-5)
    assert chooser.loss() == pytest.approx(loss_of(teacher), rel=1e-5), "all layers are back"


def test_by_loss_removes_the_layer_that_is_missed_least_again_and_again(
    chooser: LayerChooser,
) -> None:
    calls: list[tuple[int, int]] = []
    choice = chooser.by_loss(2, lambda done, total: calls.append((done, total)))
    gone: list[int] = []
    for removal in choice.removed:
        losses = {
            layer: chooser.loss([*gone, layer]) for layer in range(NUM_LAYERS) if layer not in gone
        }
        assert removal.layer == min(losses, key=lambda layer: losses[layer])
        assert removal.value == pytest.approx(losses[removal.layer])
        gone.append(removal.layer)
    assert len(gone) == NUM_LAYERS - 2
    assert choice.kept == tuple(layer for layer in range(NUM_LAYERS) if layer not in gone)
    assert choice.loss_after == pytest.approx(choice.removed[-1].value)
    assert calls == [(done, 5 + 4 + 3) for done in range(1, 13)]


@torch.inference_mode()
def test_influence_is_one_minus_the_cosine_of_a_layers_input_and_output(
    teacher: Path, chooser: LayerChooser
) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    seen: list[torch.Tensor] = []
    for layer in layers_of(model, teacher):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    last: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, torch.Tensor)
        last.append(first)

    layers_of(model, teacher)[-1].register_forward_hook(keep)
    cosines: list[list[float]] = [[] for _ in range(NUM_LAYERS)]
    for row in ROWS:
        seen.clear()
        last.clear()
        model(torch.tensor([[*row.prompt_ids.tolist(), *row.response_ids.tolist()]]))
        for index, (before, after) in enumerate(itertools.pairwise([*seen, *last])):
            cosines[index] += torch.cosine_similarity(before[0], after[0], dim=-1).tolist()
    expected = [1 - sum(values) / len(values) for values in cosines]
    assert chooser.influences() == pytest.approx(expected, abs=1e-5)
    choice = chooser.by_influence(2)
    order = sorted(range(NUM_LAYERS), key=lambda layer: expected[layer])
    assert [one.layer for one in choice.removed] == order[:3]
    assert choice.loss_after == pytest.approx(chooser.loss(order[:3]))


def test_a_model_without_a_list_of_layers_is_refused(tmp_path: Path) -> None:
    model = make.llama()
    model.model.layers = torch.nn.Sequential(*model.model.layers)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="has no list of layers named layers or h"):
        layers_of(model, tmp_path)


@pytest.mark.parametrize("by", ["loss", "influence"])
def test_the_command_writes_the_student_and_why_it_has_these_layers(
    teacher: Path, tmp_path: Path, by: str
) -> None:
    make_rows(tmp_path / "rows.jsonl", 12, start=0)
    out = tmp_path / "student"
    arguments = ["init-student", str(teacher), str(out), "--keep", "3", "--by", by]
    result = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "rows.jsonl")])
    assert result.exit_code == 0, result.output
    written = json.loads((out / "layers.json").read_text())
    assert written["by"] == by
    assert len(written["kept"]) == 3
    assert len(written["removed"]) == 2
    assert f"kept: {','.join(map(str, written['kept']))}" in result.output
    assert "loss of 8 rows with all 5 layers" in result.output
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 3
