"""What a causal LM does to its logits after the output head's matrix product, from its config.

Pure dictionaries: model checks read it without torch. Facts about the models are those of
transformers 5.19; a key that looks like a rule of the head and is not listed here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distillm_ray.errors import ModelError

SOFT_CAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# model_type prefixes for which the key means: logits times, or divided by, its value
MULTIPLIED = {
    "lm_head_multiplier": ("falcon_h1",),
    "logit_scale": ("cohere",),
    "logits_scaling": ("hyperclovax",),
}
DIVIDED = {"logits_scaling": ("granite",)}
# what transformers assumes where config.json leaves the key out
DEFAULTS = {
    ("cohere", "logit_scale"): 0.0625,
    ("gemma2", "final_logit_softcapping"): 30.0,
    ("gemma3n", "final_logit_softcapping"): 30.0,
    ("nanochat", "final_logit_softcapping"): 15.0,
    ("recurrent_gemma", "logits_soft_cap"): 30.0,
    ("vaultgemma", "final_logit_softcapping"): 30.0,
    ("xlstm", "output_logit_soft_cap"): 30.0,
}

SUSPICIOUS = re.compile(
    r"logit.*(scal|cap|mult|temp|mup)|lm_head_(mult|scal)|output_mult|dim_model_base|mup_scale"
)
# keys of attention, routing and vision that the pattern also finds
HARMLESS = re.compile(r"attn|attention|router|init_value|contrastive")
NEUTRAL: tuple[Any, ...] = (None, False, 1, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """logits = soft_cap * tanh(x / soft_cap), or x without a cap, with x = scale * head(hidden)."""

    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def name(self) -> str:
        """For messages and `show`."""
        parts = [f"scaled by {self.scale:g}"] if self.scale != 1.0 else []
        parts += [f"soft-capped at {self.soft_cap:g}"] if self.soft_cap is not None else []
        return ", ".join(parts) or "plain"


def logit_rule(model_config: Mapping[str, Any]) -> LogitRule:
    """The rule of a model, from its config as a dictionary (config.json, or `config.to_dict()`).

    Raises ModelError with the key's name where the config asks for something that is not known.
    """
    text_config = model_config.get("text_config") or model_config
    model_type = str(text_config.get("model_type") or model_config.get("model_type", ""))
    values = dict(text_config)
    for (prefix, key), default in DEFAULTS.items():
        if model_type.startswith(prefix):
            values.setdefault(key, default)
    scale, soft_cap = 1.0, None
    for key, value in values.items():
        if value in NEUTRAL or not SUSPICIOUS.search(key) or HARMLESS.search(key):
            continue
        if key in SOFT_CAP_KEYS:
            soft_cap = float(value)
        elif model_type.startswith(MULTIPLIED.get(key, ("\0",))):
            scale *= float(value)
        elif model_type.startswith(DIVIDED.get(key, ("\0",))):
            scale /= float(value)
        else:
            raise ModelError(
                f"{key} = {value!r} in the config of a {model_type!r} model changes its logits in"
                " a way that is not known here: the divergence would be computed from other"
                " distributions than the model's; use another model, or teach logit_rules.py"
            )
    return LogitRule(scale=scale, soft_cap=soft_cap)
