"""Thoughts of reasoning models, `<think>…</think>`, as texts and templates write them."""

from __future__ import annotations

import re

from distillm_ray.data.rows import RowError

REASONING = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
OPENING = re.compile(r"\s*<think>\s*")
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*$")
TAG = re.compile(r"</?think>")
_CLOSED = "\n</think>\n\n"  # ends a thought that the prompt has opened and that holds nothing


def with_opened_thought(response: str) -> str:
    """A response after a generation prompt that opens a thought, with that opening.

    What a model says there closes the thought and does not open it; so do files of `generate`.
    """
    if not OPENING.match(response) and "</think>" in response:
        return f"<think>\n{response}"
    if OPENING.match(response) and "</think>" not in response:
        raise RowError("malformed", "the response has <think> without </think>")
    return response


def after_opening(tail: str) -> str:
    """What follows a thought that the prompt has opened.

    Templates write the whole thought, only its end, or nothing for a response without one.
    """
    if opened := OPENING.match(tail):
        return tail[opened.end() :]
    return tail if tail.startswith("</think>") else _CLOSED + tail.lstrip("\n")


def answer_of(content: str) -> str:
    """What is said after a thought, without the white space around it, which templates may trim."""
    return content.rpartition("</think>")[2].strip()


def bare(text: str) -> str:
    """Text without the tags of thoughts and white space."""
    return "".join(TAG.sub("", text).split())
