"""The log of a run: records, `metrics.jsonl`, TensorBoard. Below the roles that write to it."""
