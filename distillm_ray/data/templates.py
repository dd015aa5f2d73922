"""Renders an `Example` into token ids, with the tokenizer's chat template or a plain template.

Every response ends with the token that stops generation, so that the student learns to stop. What
is rendered is compared with the row: a template that drops or changes content is found by line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from distillm_ray.config import ChatTemplate, DataConfig, PlainTemplate
from distillm_ray.data.rows import Example, RowError, Turn
from distillm_ray.errors import DataError
from distillm_ray.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Alpaca's instruction format, which the DistiLLM paper's Dolly runs use too.
_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_INSTRUCTION_WITH_CONTEXT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
)
_REASONING = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
_OPENING = re.compile(r"\s*<think>\s*")
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*$")
_CLOSED = "\n</think>\n\n"  # ends a thought that the prompt has opened and that holds nothing
_PLACEHOLDER = "ZQXplaceholderXQZ"  # a content that no template changes


class _Rewritten(RowError):
    """The template does not allow to learn all turns of this row in one sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedExample:
    """Token ids of one example.

    A demonstration is prompt and first reference. Where all turns of a conversation are learned,
    its response starts at the first assistant turn instead of the last.
    """

    prompt_ids: list[int]  # up to the last assistant turn, ready for generation
    reference_ids: list[list[int]]  # each with its end token
    demonstration_prompt_ids: list[int]  # up to the first assistant turn
    demonstration_response_ids: list[int]  # the rest; empty without a reference
    demonstration_loss_mask: list[bool]  # True on assistant tokens, their end tokens included
    last_only: bool = False  # the template did not allow to learn the earlier turns


class Renderer:
    """Applies one template with one tokenizer. Picklable, because Ray Data sends it to its tasks.

    `end_token_id` ends every response, and generators must stop at it. It is the chat template's
    end-of-turn token, or the tokenizer's `eos_token` if the template has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: DataConfig,
        *,
        vocabulary_size: int | None = None,
    ) -> None:
        """Check the template on a probe conversation.

        Args:
            vocabulary_size: the ids for which the models have rows; None: all of the tokenizer's.

        Raises:
            DataError: there is no chat template or no end token, the template refuses or drops the
                system message, its prompt is not a prefix of its conversation, or the model has no
                row for the end token.
        """
        self._tokenizer = tokenizer
        self._template = template = config.template
        self._reasoning = config.reasoning
        self._conversations = config.conversations
        self._time = config.time or datetime.now()
        self._vocabulary_size = vocabulary_size
        self._eos_token_id = _id_or_none(tokenizer.eos_token_id)
        self._end_text: str | None = None
        self._opening = ""  # the reasoning that the generation prompt opens
        control = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        control |= {str(token) for token in tokenizer.all_special_tokens}
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        empty: Any = tokenizer("")["input_ids"]
        bos = _id_or_none(tokenizer.bos_token_id)
        self._bos_ids = [bos] if bos is not None and list(empty)[:1] == [bos] else []
        match template:
            case ChatTemplate():
                self.end_token_id = self._probe_chat_template()
            case PlainTemplate():
                self.end_token_id = self._require_eos()
        if vocabulary_size is not None and self.end_token_id >= vocabulary_size:
            raise DataError(
                f"the end token {tokenizer.convert_ids_to_tokens(self.end_token_id)!r} of"
                f" {tokenizer.name_or_path} has id {self.end_token_id}, but the model has rows for"
                f" {vocabulary_size} ids only: no response could end; add rows to the model, or use"
                " another template"
            )

    def render(self, example: Example) -> RenderedExample:
        """Token ids of the prompt, its references and its demonstration.

        Raises:
            RowError: the template cannot express this row, changes its content, or rewrites its
                earlier turns; the content holds a control token; or the model lacks a token's row.
        """
        for turn in example.turns:
            self._check_control(f"the {turn.role} message", turn.content)
        for reference in example.references:
            self._check_control("the response", reference)
        match self._template:
            case ChatTemplate():
                rendered = self._render_chat(example)
            case PlainTemplate(name=name):
                rendered = self._render_plain(example, name)
        self._check_rows(rendered)
        return rendered

    def _check_control(self, what: str, content: str) -> None:
        """A tokenizer reads the text of a control token as the token, wherever it stands."""
        found = self._control.search(content) if self._control.pattern else None
        if found:
            raise RowError(
                "malformed",
                f"{what} contains the control token {found[0]!r} at character {found.start() + 1}:"
                " it would become the token itself, and end a turn or open one in the middle of"
                " the text; write it differently",
            )

    def _check_rows(self, rendered: RenderedExample) -> None:
        limit = self._vocabulary_size
        if limit is None:
            return
        for ids in (
            rendered.prompt_ids,
            rendered.demonstration_response_ids,
            *rendered.reference_ids,
        ):
            beyond = next((index for index in ids if index >= limit), None)
            if beyond is not None:
                token = self._tokenizer.convert_ids_to_tokens(beyond)
                raise RowError(
                    "malformed",
                    f"it contains {token!r} (id {beyond}), for which the model has no row",
                )

    # ---- chat ----

    def _render_chat(self, example: Example) -> RenderedExample:
        turns = self._with_system(example.turns)
        prompt_text = self._prompt_text(turns)
        prompt_ids = self._encode(prompt_text)
        references = [
            self._continue(prompt_text, prompt_ids, self._response_text(turns, reference))
            for reference in example.references
        ]
        reference_ids = [self._ended(ids) for ids in references]
        # An assistant message at the very beginning is context: no prompt stands before it.
        several = any(turn.role == "assistant" for turn in turns[1:])
        single = _single_turn(prompt_ids, reference_ids)
        if not reference_ids or not several or self._conversations in ("last", "split"):
            return single
        try:
            return self._render_multi_turn(turns, example.references[0], prompt_ids, reference_ids)
        except _Rewritten:
            if self._conversations == "all":
                raise
            return replace(single, last_only=True)

    def _render_multi_turn(
        self,
        turns: tuple[Turn, ...],
        reference: str,
        prompt_ids: list[int],
        reference_ids: list[list[int]],
    ) -> RenderedExample:
        if self._end_text is None:
            raise _Rewritten(
                "malformed",
                "the chat template does not mark the end of an assistant turn, so the turns of a"
                " conversation cannot be learned in one sequence; set data.conversations=last",
            )
        conversation = (*turns, Turn(role="assistant", content=reference))
        assistant_turns = [
            index for index, turn in enumerate(conversation) if index and turn.role == "assistant"
        ]
        text = self._chat_text(conversation[: assistant_turns[0]], generate=True)
        ids = self._encode(text)
        num_prompt = len(ids)
        mask: list[bool] = []
        for index in assistant_turns:
            before = self._chat_text(conversation[:index], generate=True)
            response = self._response_text(conversation[:index], conversation[index].content)
            if not before.startswith(text):
                raise _Rewritten(
                    "malformed",
                    f"the chat template rewrites earlier turns: the conversation up to message"
                    f" {index + 1} does not begin with the turns before it, so its tokens cannot"
                    " be learned in one sequence; set data.conversations to last or split",
                )
            for addition, learned in ((before[len(text) :], False), (response, True)):
                added = self._continue(text, ids, addition)
                if learned:
                    added = self._ended(added)
                ids = ids + added
                text += addition
                mask += [learned] * len(added)
        return RenderedExample(
            prompt_ids=prompt_ids,
            reference_ids=reference_ids,
            demonstration_prompt_ids=ids[:num_prompt],
            demonstration_response_ids=ids[num_prompt:],
            demonstration_loss_mask=mask,
        )

    def _prompt_text(self, turns: tuple[Turn, ...]) -> str:
        text = self._chat_text(turns, generate=True)
        for turn in turns:
            # Templates may drop the reasoning of earlier turns: the model never sees it either.
            earlier = turn.role == "assistant"
            content = turn.content.rpartition("</think>")[2] if earlier else turn.content
            if not _contains(text, content):
                which = "an earlier assistant message" if earlier else f"the {turn.role} message"
                raise RowError("malformed", f"the chat template changes {which}")
        return text

    def _response_text(self, turns: tuple[Turn, ...], response: str) -> str:
        """The text after the generation prompt, for `response`, up to and including its end token.

        The generation prompt may open a thought, which the response then closes.
        """
        prompt = self._chat_text(turns, generate=True)
        start = prompt.removesuffix(self._opening)
        if self._opening:
            response = _with_opened_thought(response)
        tail = self._tail(start, prompt, turns, response)
        thought = _REASONING.fullmatch(response)
        lost = not _contains(tail, response)
        if lost and (thought is None or not _contains(tail, thought["rest"])):
            raise RowError("malformed", "the chat template changes the response")
        if lost and self._reasoning == "fail":
            raise RowError(
                "malformed",
                "the chat template drops the reasoning of the response (<think> … </think>), which"
                " would be missing from what is learned; set data.reasoning=keep to train on it,"
                " or data.reasoning=drop to train on the rest",
            )
        if lost and self._reasoning == "keep":
            tail = self._tail(start, prompt, turns, _PLACEHOLDER)
            before, _, after = tail.partition(_PLACEHOLDER)
            tail = _EMPTY_THOUGHT.sub("", before) + response.strip() + after
        if self._opening:
            opened = _OPENING.match(tail)
            tail = tail[opened.end() :] if opened else _CLOSED + tail
        end = tail.rfind(self._end_text) if self._end_text is not None else -1
        said = tail[:end] if end >= 0 else tail
        if not said.removeprefix(_CLOSED).strip():
            raise RowError("empty", "the response is empty without its reasoning")
        return tail[: end + len(self._end_text or "")] if end >= 0 else tail

    def _tail(self, start: str, prompt: str, turns: tuple[Turn, ...], response: str) -> str:
        """What the template writes after `start` for an assistant turn."""
        conversation = self._chat_text(
            (*turns, Turn(role="assistant", content=response)), generate=False
        )
        if not conversation.startswith(start):
            raise RowError(
                "malformed",
                "the chat template's prompt is not a prefix of the whole conversation:"
                f" the prompt ends in {prompt[-60:]!r}, the conversation has"
                f" {conversation[max(0, len(prompt) - 60) : len(prompt) + 20]!r} there",
            )
        return conversation[len(start) :]

    def _chat_text(self, turns: tuple[Turn, ...], *, generate: bool) -> str:
        assert isinstance(self._template, ChatTemplate)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        # Templates that write the date call strftime_now; its own clock would change with the day.
        variables: dict[str, Any] = {
            **self._template.variables,
            "strftime_now": self._time.strftime,
        }
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **variables,
                )
            )
        except TemplateError as error:
            raise RowError("malformed", f"the chat template refuses the row: {error}") from error

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        assert isinstance(self._template, ChatTemplate)
        if self._template.system is None or turns[0].role == "system":
            return turns
        return (Turn(role="system", content=self._template.system), *turns)

    def _probe_chat_template(self) -> int:
        if not self._tokenizer.chat_template:
            raise DataError(
                f"data.template is chat, but the tokenizer of {self._tokenizer.name_or_path} has no"
                " chat template; set data.template.type=plain"
            )
        assert isinstance(self._template, ChatTemplate)
        response = "probe"
        turns = self._with_system((Turn(role="user", content="probe"),))
        name = self._tokenizer.name_or_path
        try:
            if self._template.system:
                self._check_control("data.template.system", self._template.system)
            prompt = self._prompt_text(turns)
            self._opening = self._find_opening(prompt, turns, response)
            tail = self._response_text(turns, response)
        except RowError as error:
            raise DataError(f"data.template: {error.reason} (tokenizer of {name})") from error
        except Exception as error:  # a template is code of the user's model
            raise DataError(
                f"data.template: the chat template of {name} fails on a plain conversation:"
                f" {type(error).__name__}: {error}"
            ) from error
        after = tail[tail.rfind(response) + len(response) :]
        special = set(self._tokenizer.all_special_ids) | {
            index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        end = next((index for index in self._encode(after) if index in special), None)
        if end is None:
            return self._require_eos()
        text = self._tokenizer.convert_ids_to_tokens(end)
        assert isinstance(text, str)
        self._end_text = text
        return end

    def _find_opening(self, prompt: str, turns: tuple[Turn, ...], response: str) -> str:
        """The thought that the generation prompt opens and a conversation does not; or empty."""
        conversation = self._chat_text(
            (*turns, Turn(role="assistant", content=response)), generate=False
        )
        if conversation.startswith(prompt):
            return ""
        start = prompt[: prompt.rfind("<think>")] if "<think>" in prompt else prompt
        start = start.rstrip() if not conversation.startswith(start) else start
        opening = prompt[len(start) :]
        return opening if _OPENING.fullmatch(opening) and conversation.startswith(start) else ""

    # ---- plain ----

    def _render_plain(self, example: Example, name: str) -> RenderedExample:
        if len(example.turns) != 1 or example.turns[0].role != "user":
            raise RowError(
                "malformed",
                f"data.template {name} expresses one user message with one response, got"
                f" {len(example.turns)} messages before the response; use data.template.type=chat",
            )
        if name == "instruction" and example.finished_prompt:
            raise RowError(
                "malformed",
                "the prompt holds its instruction already, and data.template.name instruction would"
                " wrap it a second time; set data.template.name=raw",
            )
        if name == "raw":
            text = example.text
        elif example.context:
            text = _INSTRUCTION_WITH_CONTEXT.format(
                instruction=example.instruction, context=example.context
            )
        else:
            text = _INSTRUCTION.format(instruction=example.instruction)
        prompt_ids = self._bos_ids + self._encode(text)
        references = [
            self._ended(self._continue(text, prompt_ids, response, num_special=len(self._bos_ids)))
            for response in example.references
        ]
        return _single_turn(prompt_ids, references)

    # ---- tokens ----

    def _encode(self, text: str) -> list[int]:
        ids: Any = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def _continue(
        self, text: str, ids: list[int], addition: str, *, num_special: int = 0
    ) -> list[int]:
        """Tokens of `addition` after `text`, whose tokens `ids` are kept.

        If the tokenizer would merge tokens across the border, `addition` is tokenized alone:
        generation also starts from exactly the tokens of `text`.
        """
        whole = self._encode(text + addition)
        known = ids[num_special:]
        if whole[: len(known)] == known:
            return whole[len(known) :]
        return self._encode(addition)

    def _ended(self, ids: list[int]) -> list[int]:
        """The response with its end token, which must not occur earlier in it."""
        ended = ids if ids[-1:] == [self.end_token_id] else [*ids, self.end_token_id]
        if self.end_token_id in ended[:-1]:
            raise RowError(
                "malformed",
                f"the response contains the end token"
                f" {self._tokenizer.convert_ids_to_tokens(self.end_token_id)!r}, which would stop"
                " generation there",
            )
        return ended

    def _require_eos(self) -> int:
        if self._eos_token_id is None:
            raise DataError(
                f"the tokenizer of {self._tokenizer.name_or_path} has no eos_token: responses would"
                " have no end token and the student would never learn to stop"
            )
        return self._eos_token_id


def _with_opened_thought(response: str) -> str:
    """A response after a generation prompt that opens a thought, with that opening.

    What a model says there closes the thought and does not open it; so do files of `generate`.
    """
    if not _OPENING.match(response) and "</think>" in response:
        return f"<think>\n{response}"
    if _OPENING.match(response) and "</think>" not in response:
        raise RowError("malformed", "the response has <think> without </think>")
    return response


def _single_turn(prompt_ids: list[int], reference_ids: list[list[int]]) -> RenderedExample:
    response_ids = reference_ids[0] if reference_ids else []
    return RenderedExample(
        prompt_ids=prompt_ids,
        reference_ids=reference_ids,
        demonstration_prompt_ids=prompt_ids,
        demonstration_response_ids=response_ids,
        demonstration_loss_mask=[True] * len(response_ids),
    )


def _contains(text: str, content: str) -> bool:
    """Whether `content` stands in `text`; white space, which templates may trim, is ignored."""
    return "".join(content.split()) in "".join(text.split())


def _id_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def decode(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """The response as text, without end tokens and surrounding space."""
    text = tokenizer.decode(rollout.response_ids.tolist(), skip_special_tokens=True)
    assert isinstance(text, str)
    return text.strip()
