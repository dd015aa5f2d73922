"""Code that runs inside vLLM's worker processes: vocabulary limit, weight loading, their end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from distillm_ray.rollout.engine_owner import end_with_owner
from distillm_ray.weights.buckets import read_tensors

_SHARED_MEMORY = "/dev/shm/vllm_dist_"


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

    def unlink_shared_memory(self) -> None:
        """Remove the names of the memory through which workers on a CPU exchange tensors.

        Every worker has mapped it by now. vLLM leaves it behind, also at its normal end.
        """
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            _, slash, rest = line.partition("/")
            if (path := slash + rest).startswith(_SHARED_MEMORY):
                Path(path).unlink(missing_ok=True)

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


end_with_owner()
