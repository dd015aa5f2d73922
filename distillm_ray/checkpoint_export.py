"""`distillm-ray export`: a model directory from a checkpoint of a run, finished or not.

It runs in one process, without Ray, on the checkpoint's files.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distillm_ray.config import Config, StudentConfig
from distillm_ray.config.files import load_config
from distillm_ray.data.templates import Renderer
from distillm_ray.errors import RunDirectoryError
from distillm_ray.files import check_writable
from distillm_ray.learner.checkpoint import Checkpoint, CheckpointDirectory
from distillm_ray.learner.student_model import PackedStudent, load_student
from distillm_ray.models.directory import check_model_directory
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.remote.inputs import fetched
from distillm_ray.run_directory import CHECKPOINT_FOLDER, CONFIG_FILE
from distillm_ray.weights.export import export_model
from distillm_ray.weights.gather import EXPORT_ELEMENTS, gather

_WHOLE = "engine/mp_rank_00_model_states.pt"  # ZeRO 0 to 2: the weights are in one piece
_OPTIMIZER = "engine/*_optim_states.pt"


def export(run: Path, which: str, output: Path | None) -> list[str]:
    """Write the student of a checkpoint as a model directory; returns what to tell the user.

    Args:
        which: `best` by `validation.metric`, `latest`, or a number of steps.
        output: the directory to make; None: `model-step-N` in the run directory.

    Raises:
        UserError: the run has no such checkpoint, or `output` exists.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise RunDirectoryError(f"{run} holds no {CONFIG_FILE}: not a run directory")
    config = load_config(path)
    checkpoint = find_checkpoint(run, config, which)
    step = checkpoint.meta.step
    directory = output or run / f"model-step-{step}"
    if directory.exists():
        raise RunDirectoryError(
            f"--output: {directory} exists and is not overwritten; remove it or name another"
        )
    check_writable(directory.absolute().parent, "--output")
    tokenizer = load_tokenizer(
        fetched(config.student.model), trust_remote_code=config.student.trust_remote_code
    )
    facts = check_model_directory(
        config.student.model, "student", trust_remote_code=config.student.trust_remote_code
    )
    end_token_id = Renderer(tokenizer, config.data).end_token_id
    directory.parent.mkdir(parents=True, exist_ok=True)
    write_model(config.student, checkpoint, directory, facts.ends(end_token_id))
    loss = checkpoint.meta.value("loss")
    known = f", validation loss {loss:.4f}" if loss is not None else ""
    return [f"{directory}: the student after step {step}{known}"]


def write_model(
    student: StudentConfig, checkpoint: Checkpoint, directory: Path, end_token_ids: Sequence[int]
) -> None:
    """Write the checkpoint's student as `Learner.export` would have done after that step."""
    weights = read_weights(checkpoint)
    device = torch.device("cpu")
    # Stage 1 refuses no dtype; nothing else here depends on the stage.
    packed = load_student(student, device=device, zero_stage=1)
    PackedStudent(packed).load_state_dict(weights)
    # A checkpoint of ZeRO 3 has float32 weights, whatever the student's dtype.
    whole = {value.dtype for value in weights.values() if value.is_floating_point()}
    dtype = resolve_dtype(student.dtype, device)
    if dtype not in whole and student.dtype == "auto" and len(whole) == 1:
        (dtype,) = whole
    buckets = gather(packed.model, dtype, keep=True, bucket_elements=EXPORT_ELEMENTS)
    export_model(buckets, fetched(student.model), directory, dtype, end_token_ids=end_token_ids)


def find_checkpoint(run: Path, config: Config, which: str) -> Checkpoint:
    """The checkpoint that `which` names.

    Raises:
        RunDirectoryError: there is none; the message lists those that exist.
    """
    folder = CheckpointDirectory(
        run / CHECKPOINT_FOLDER, keep=config.checkpoint.keep, metric=config.validation.metric
    )
    complete = folder.complete()
    damaged = "".join(f"; {damage}" for damage in folder.damaged())
    if not complete and damaged:
        raise RunDirectoryError(f"{run} has no checkpoint that can be exported{damaged}")
    if not complete:
        raise RunDirectoryError(
            f"{run} has no checkpoint: run.mode=local writes none, and a run its first after"
            " checkpoint.interval steps, at its end, or when it is stopped"
        )
    steps = {found.meta.step: found for found in complete}
    found = None
    match which:
        case "latest":
            found = folder.latest()
        case "best":
            found = folder.best()
            if found is None:
                raise RunDirectoryError(
                    f"--checkpoint best: no checkpoint of {run} was validated at its own step"
                    f" (there are {_listed(steps)}); make checkpoint.interval a multiple of"
                    " validation.interval, or set checkpoint.at_best, and name a step meanwhile"
                )
        case number if number.isascii() and number.isdigit():
            found = steps.get(int(number))
    if found is None:
        raise RunDirectoryError(
            f"--checkpoint must be best, latest or the step of a checkpoint, got {which!r};"
            f" {run} has {_listed(steps)}{damaged}"
        )
    return found


def read_weights(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """The weights by parameter name, as the learner's module has them.

    In the student's dtype under ZeRO 0 to 2, in float32 under ZeRO 3, whose ranks hold parts.

    Raises:
        RunDirectoryError: the checkpoint's files are incomplete.
    """
    whole = checkpoint.learner_path / _WHOLE
    if whole.is_file():
        # The file is this program's own, and holds more than tensors.
        with _readable(checkpoint):
            return torch.load(whole, map_location="cpu", mmap=True, weights_only=False)["module"]
    if not any(checkpoint.learner_path.glob(_OPTIMIZER)):
        raise RunDirectoryError(f"{checkpoint.path} has no weights: its files were removed")
    # Imported here: DeepSpeed takes seconds.
    from deepspeed.utils.zero_to_fp32 import (  # noqa: PLC0415
        get_fp32_state_dict_from_zero_checkpoint,
    )

    quiet = contextlib.redirect_stdout(io.StringIO())
    with _readable(checkpoint), quiet, contextlib.redirect_stderr(io.StringIO()):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.learner_path), "engine")
    assert weights is not None
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what readers raise for a file that was cut off or changed into a user's error."""
    try:
        yield
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise RunDirectoryError(
            f"{checkpoint.path} cannot be read, its files are damaged: {error}; export another"
            " checkpoint"
        ) from error


def _listed(steps: dict[int, Checkpoint]) -> str:
    return "steps " + ", ".join(map(str, steps))
