"""What a run directory holds, by name."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"
MODEL_FOLDER = "model"
CHECKPOINT_FOLDER = "checkpoints"
