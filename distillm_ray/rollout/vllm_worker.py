"""What runs inside vLLM's worker processes: taking weights from node-local memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from distillm_ray.weights.buckets import read_tensors


class WorkerExtension:
    """Mixed into vLLM's worker by `worker_extension_cls`; called through `collective_rpc`."""

    # the worker's own
    model_runner: Any
    reload_weights: Callable[..., None]

    def limit_vocabulary(self, size: int) -> None:
        """Make the ids from `size` on, which pad the output head, impossible."""
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def limited(*arguments: Any, **settings: Any) -> Any:
            logits = compute_logits(*arguments, **settings)
            if logits is not None:  # another rank has them
                logits[..., size:] = -math.inf
            return logits

        model.compute_logits = limited

    def take_weights(self, directory: str) -> None:
        """Replace the model's weights by those in `directory`, named as in the checkpoint.

        `reload_weights` repacks them as the backend needs; `model.load_weights` alone would not.
        """
        self.reload_weights(weights_iterator=read_tensors(Path(directory)))
        # A tied head is not in the checkpoint, so nothing repacked it: on CPUs it would go on
        # multiplying with the old weights.
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def _end_with_parent() -> None:
    """vLLM's engine process outlives a generator that was killed, and keeps its memory."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


if multiprocessing.parent_process() is not None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
