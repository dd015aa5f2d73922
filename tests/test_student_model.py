"""Loading the student with its adapters, and settings that are refused."""

from pathlib import Path

import pytest
import torch

from distillm_ray.config import LoraConfig, StudentConfig
from distillm_ray.errors import ConfigError, ModelError
from distillm_ray.learner.student_model import load_student
from tests import make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student")
    make.llama().save_pretrained(path)
    return path


def test_bfloat16_under_zero_0_is_refused_with_the_remedy(directory: Path) -> None:
    student = StudentConfig(model=directory, dtype="bfloat16")
    with pytest.raises(ConfigError, match=r"set learner\.zero_stage=1"):
        load_student(student, device=CPU, zero_stage=0)


def test_lora_trains_only_its_adapters_on_every_linear_layer_of_the_backbone(
    directory: Path,
) -> None:
    student = StudentConfig(model=directory, dtype="float32", lora=LoraConfig(rank=2))
    model = load_student(student, device=CPU, zero_stage=1).model
    trained = [name for name, one in model.named_parameters() if one.requires_grad]
    assert len(trained) == 2 * 2 * 7  # A and B, layers, projections of a layer
    assert all("lora_" in name for name in trained)
    assert type(model.get_output_embeddings()) is torch.nn.Linear


def test_a_lora_target_that_the_model_lacks_is_named(directory: Path) -> None:
    lora = LoraConfig(target_modules=("no_such_layer",))
    student = StudentConfig(model=directory, dtype="float32", lora=lora)
    with pytest.raises(ModelError, match="no_such_layer"):
        load_student(student, device=CPU, zero_stage=1)
