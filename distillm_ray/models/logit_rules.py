"""What a causal LM does to its logits after the output head's matrix product, from its config.

The module reads plain dictionaries, so that model checks need no torch. What the keys mean is taken
from transformers 5.19. A key that looks like a rule of the head and is not listed here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distillm_ray.errors import ModelError

SOFT_CAP_KEYS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Key to the model_type prefixes that multiply, or divide, the logits by its value.
MULTIPLIED = {
    "lm_head_multiplier": ("falcon_h1",),
    "logit_scale": ("cohere",),
    "logits_scaling": ("hyperclovax",),
}
DIVIDED = {"logits_scaling": ("granite",)}
# The default of transformers where config.json omits the key.
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
# Keys of attention, routing and vision that also match SUSPICIOUS.
HARMLESS = re.compile(r"attn|attention|router|init_value|contrastive")
NEUTRAL: tuple[Any, ...] = (None, False, 1, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitRule:
    """logits = soft_cap * tanh(x / soft_cap), or x without a cap, with x = scale * head(hidden)."""

    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def name(self) -> str:
        """Description for messages and `show`."""
        parts = [f"scaled by {self.scale:g}"] if self.scale != 1.0 else []
        parts += [f"soft-capped at {self.soft_cap:g}"] if self.soft_cap is not None else []
        return ", ".join(parts) or "plain"


def logit_rule(model_config: Mapping[str, Any]) -> LogitRule:
    """Read the rule from a model's config (config.json, or `config.to_dict()`).

    Raises:
        ModelError: a key that probably changes the logits, in an unknown way.
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
        elif (model_type, key) == ("minicpm3", "dim_model_base"):  # the width of the tuned model
            scale *= float(value) / float(values["hidden_size"])
        else:
            raise ModelError(
                f"{key} = {value!r} in the config of a {model_type!r} model changes its logits in"
                " an unknown way: the divergence would compare other distributions than the"
                " model's; use another model, or add the rule to logit_rules.py"
            )
    return LogitRule(scale=scale, soft_cap=soft_cap)
