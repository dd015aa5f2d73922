"""What a run writes down while it works: records, `metrics.jsonl`, TensorBoard."""
