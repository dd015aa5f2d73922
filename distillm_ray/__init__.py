"""Distil large language models into small ones on a Ray cluster, the DistiLLM way."""

__version__ = "0.1.0"
