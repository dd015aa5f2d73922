"""The probe of `distillm-ray plan` on tiny models: every stage is measured by the run's engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distillm_ray.cli import app
from distillm_ray.plan.stages import read_stages
from tests.integration.tiny import LIMIT_S, make_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2 * LIMIT_S)]


def test_the_probe_measures_every_stage_and_its_file_gives_the_same_plan(tmp_path: Path) -> None:
    config = make_config(tmp_path, steps=8, batch_size=4)
    saved = tmp_path / "stages.json"

    def plan(*arguments: str) -> dict[str, object]:
        result = CliRunner().invoke(app, ["plan", str(config), "--json", *arguments])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    measured = plan("--save-stages", str(saved))
    stages = read_stages(saved)
    assert stages.generation is not None and stages.scoring is not None
    assert stages.generation.engine_step + stages.generation.token > 0.0
    assert stages.generation.load > 0.0
    assert len(stages.generation.response_tokens) > 1
    assert max(stages.generation.response_tokens) <= 16
    assert stages.scoring.batch + stages.scoring.token > 0.0
    learning = stages.learning
    assert learning.step + learning.row + learning.token + learning.loss_token > 0.0
    assert min(learning.validation_token, learning.gather, learning.checkpoint) > 0.0
    assert stages.contention >= 1.0
    assert plan("--stages", str(saved)) == measured
    assert not (tmp_path / "run").exists()
