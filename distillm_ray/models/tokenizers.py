"""Loads the tokenizer of a model directory: the one that the data are tokenized with.

Every part of a run that needs a tokenizer or the size of its vocabulary gets it here. Reading
`tokenizer.json` alone would miss tokens that `tokenizer_config.json` adds.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory that `check_model_directory` has accepted."""
    return AutoTokenizer.from_pretrained(
        directory, trust_remote_code=trust_remote_code, local_files_only=True
    )
