"""Code that runs inside vLLM's worker processes: vocabulary limit and weight loading."""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from distillm_ray.weights.buckets import read_tensors


class WorkerExtension:
    """Mixed into vLLM's worker by `worker_extension_cls`; called through `collective_rpc`."""

    # Attributes of vLLM's worker. vLLM has no public type for either.
    model_runner: Any
    reload_weights: Callable[..., None]

    def limit_vocabulary(self, size: int) -> None:
        """Set the logits of the ids from `size` on, the output head's padding, to -inf."""
        model = self.model_runner.get_model()
        compute_logits = model.compute_logits

        def limited(*arguments: Any, **settings: Any) -> Any:
            logits = compute_logits(*arguments, **settings)
            if logits is not None:  # with tensor parallelism only one rank has them
                logits[..., size:] = -math.inf
            return logits

        model.compute_logits = limited

    def take_weights(self, directory: str) -> None:
        """Replace the model's weights with those in `directory`, named as in the checkpoint.

        `reload_weights` also repacks them for the backend; `model.load_weights` does not.
        """
        layers = list(self.model_runner.get_model().modules())
        if current_platform.is_cpu():
            # vLLM repacks experts for its CPU kernel only when it builds that kernel, and would
            # multiply with reloaded weights as if they were packed.
            for layer in layers:
                method = getattr(layer, "quant_method", None)
                if isinstance(method, UnquantizedFusedMoEMethod):
                    method.moe_kernel = None
        self.reload_weights(weights_iterator=read_tensors(Path(directory)))
        # A tied head is not in the checkpoint, so it is not repacked above: on CPUs it would keep
        # multiplying with the old weights.
        for layer in layers:
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)


def _end_with_parent() -> None:
    """Exit when the generator is killed; vLLM's engine process would live on with its memory."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


if multiprocessing.parent_process() is not None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
