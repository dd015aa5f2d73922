"""Renders an `Example` into token ids, with the tokenizer's chat template or a plain template.

Every response ends with the token that stops generation, so that the student learns to stop. What
is rendered is compared with the row: a template that drops or changes content is found by line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from distillm_ray.config import ChatTemplate, DataConfig, PlainTemplate
from distillm_ray.data.decoding import decode_ids
from distillm_ray.data.rows import Example, RowError, Turn
from distillm_ray.data.same_text import loses_indentation, normalized
from distillm_ray.data.thoughts import (
    EMPTY_THOUGHT,
    OPENING,
    REASONING,
    TAG,
    after_opening,
    answer_of,
    bare,
    with_opened_thought,
)
from distillm_ray.errors import DataError

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
_MAX_FRAMES = 1000
_MAX_PARTS = 1000
_INDENTATION = (
    "the chat template removes the indentation of the first line of {}, which other lines have too,"
    " as in code: put the text into a code block, or begin with a line without indentation"
)
_PLACEHOLDER = "ZQXplaceholderXQZ"  # a content that no template changes


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
        # By id, of a tokenizer that cuts texts at them before anything else.
        self._added = {
            index: token.content
            for index, token in tokenizer.added_tokens_decoder.items()
            if tokenizer.is_fast and not token.normalized and not token.single_word
        }
        self._parts: dict[str, list[int] | None] = {}  # ends of prompts, with their tokens
        self._end_text: str | None = None
        self._opening = ""  # the reasoning that the generation prompt opens
        self._frames: dict[tuple[str, ...], str] = {}  # by the roles of a conversation
        self._around: tuple[str, str] | None = None  # of a response, as the template writes it
        control = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        control |= {str(token) for token in tokenizer.all_special_tokens}
        self._control = _any_of(control)
        empty: Any = tokenizer("")["input_ids"]
        bos = _id_or_none(tokenizer.bos_token_id)
        # What the tokenizer itself puts before a text.
        self.bos_ids = [bos] if bos is not None and list(empty)[:1] == [bos] else []
        match template:
            case ChatTemplate():
                self._control = _any_of(control | self._turn_markers())
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
        self._check_text(example, rendered)
        return rendered

    @property
    def document_end_token_id(self) -> int:
        """The tokenizer's `eos_token`, which ends documents of a corpus.

        Raises:
            DataError: it has none.
        """
        if self._eos_token_id is None:
            raise DataError(
                f"data.corpus: the tokenizer of {self._tokenizer.name_or_path} has no eos_token, so"
                " a document could not end; name one in its tokenizer_config.json"
            )
        return self._eos_token_id

    def document_ids(self, text: str) -> list[int]:
        """Token ids of a plain document, without a template, and its end token.

        Raises:
            RowError: the text holds a control token or cannot be read back from its ids, or the
                model lacks a token's row.
        """
        self._check_control("the document", text)
        try:
            ids = self._encode(text)
        except Exception as error:  # a tokenizer is code of the user's model
            raise RowError("malformed", f"{type(error).__name__}: {error}") from error
        if not ids:
            raise RowError("empty", "the document has no tokens")
        self._check_said("the document", self._decode(ids), text)
        ids.append(self.document_end_token_id)
        self._check_known(ids)
        return ids

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
        for ids in (
            rendered.prompt_ids,
            rendered.demonstration_response_ids,
            *rendered.reference_ids,
        ):
            self._check_known(ids)

    def _check_known(self, ids: Sequence[int]) -> None:
        limit = self._vocabulary_size
        if limit is None:
            return
        beyond = next((index for index in ids if index >= limit), None)
        if beyond is not None:
            token = self._tokenizer.convert_ids_to_tokens(beyond)
            raise RowError(
                "malformed",
                f"it contains {token!r} (id {beyond}), for which the model has no row",
            )

    def _check_text(self, example: Example, rendered: RenderedExample) -> None:
        """Compare what the ids say with the row: `<unk>` and lower case change what is learned."""
        prompt = self._decode(rendered.prompt_ids)
        said = [(f"the {turn.role} message", self._content(turn)) for turn in example.turns]
        if isinstance(self._template, PlainTemplate) and example.context:
            parts = (example.instruction, example.context)
            said = [("the user message", part) for part in parts]
        for what, content in said:
            self._check_said(what, prompt, content)
        for reference, ids in zip(example.references, rendered.reference_ids, strict=True):
            learned = self._decode(ids)
            answer = answer_of(reference)
            opened = OPENING.match(answer)  # of a thought that was cut off
            self._check_said("the response", learned, answer[opened.end() :] if opened else answer)
            thought = REASONING.fullmatch(reference)
            if thought is not None and self._reasoning != "drop":
                self._check_said("the reasoning", learned, thought["thought"])

    def _check_said(self, what: str, said: str, content: str) -> None:
        said, content = normalized(said), normalized(content.strip())
        if content in said:
            return
        words = content.split()
        # What a reader recognizes: the first word that is gone, or the whole.
        lost = next((word for word in words if word not in said), _shortened(content))
        raise RowError(
            "malformed",
            f"the tokenizer changes {what}: {lost!r} cannot be read back from its ids (as"
            f" {_shortened(said)!r}); the models would learn another text than the row's",
        )

    def _decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self._tokenizer, ids)

    # ---- chat ----

    def _render_chat(self, example: Example) -> RenderedExample:
        turns = self._with_system(example.turns)
        prompt_text = self._prompt_text(turns)
        prompt_ids = self._encode(prompt_text)
        references = [
            self._continue(
                prompt_text,
                prompt_ids,
                self._response_text(
                    turns, reference, ended=not example.truncated, prompt=prompt_text
                ),
            )
            for reference in example.references
        ]
        reference_ids = [self._ended(ids, truncated=example.truncated) for ids in references]
        # An assistant message at the very beginning is context: no prompt stands before it.
        several = any(turn.role == "assistant" for turn in turns[1:])
        single = _single_turn(prompt_ids, reference_ids)
        if not reference_ids or not several or self._conversations in ("last", "split"):
            return single
        try:
            return self._render_multi_turn(turns, example, prompt_ids, reference_ids)
        except RowError:  # the last response was rendered well, so an earlier turn is wrong
            if self._conversations == "all":
                raise
            return replace(single, last_only=True)

    def _render_multi_turn(
        self,
        turns: tuple[Turn, ...],
        example: Example,
        prompt_ids: list[int],
        reference_ids: list[list[int]],
    ) -> RenderedExample:
        if self._end_text is None:
            raise RowError(
                "malformed",
                "the chat template does not mark the end of an assistant turn, so the turns of a"
                " conversation cannot be learned in one sequence; set data.conversations=last",
            )
        conversation = (*turns, Turn(role="assistant", content=example.references[0]))
        assistant_turns = [
            index for index, turn in enumerate(conversation) if index and turn.role == "assistant"
        ]
        text = self._chat_text(conversation[: assistant_turns[0]], generate=True)
        ids = self._encode(text)
        num_prompt = len(ids)
        mask: list[bool] = []
        for index in assistant_turns:
            before = self._chat_text(conversation[:index], generate=True)
            truncated = example.truncated and index == assistant_turns[-1]
            try:
                response = self._response_text(
                    conversation[:index], conversation[index].content, ended=not truncated
                )
            except RowError as error:
                raise RowError(error.kind, f"message {index + 1}: {error.reason}") from error
            if not before.startswith(text):
                raise RowError(
                    "malformed",
                    f"the chat template rewrites earlier turns: the conversation up to message"
                    f" {index + 1} does not begin with the turns before it, so its tokens cannot"
                    " be learned in one sequence; set data.conversations to last or split",
                )
            for addition, learned in ((before[len(text) :], False), (response, True)):
                added = self._continue(text, ids, addition)
                if learned:
                    added = self._ended(added, truncated=truncated)
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
        # Templates may drop the reasoning of earlier turns: the model never sees it either.
        contents = [self._content(turn) for turn in turns]
        # Counted: what a dropped message says may stand in another one, or in the template.
        everything = "\0".join([*contents, self._frame(tuple(turn.role for turn in turns))])
        for turn, content in zip(turns, contents, strict=True):
            if content and text.count(content) < everything.count(content):
                earlier = turn.role == "assistant"
                which = "an earlier assistant message" if earlier else f"the {turn.role} message"
                raise RowError("malformed", f"the chat template changes {which}")
            if loses_indentation(turn.content, text):
                raise RowError("malformed", _INDENTATION.format(f"the {turn.role} message"))
        return text

    def _content(self, turn: Turn) -> str:
        """What of a message every template has to render: an answer without its thoughts.

        An answer that only mentions `</think>` has no thoughts.
        """
        thoughtful = self._opening or REASONING.fullmatch(turn.content)
        if turn.role == "assistant" and thoughtful:
            return answer_of(turn.content)
        return turn.content.strip()

    def _is_open_thought(self, response: str) -> bool:
        begun = self._opening or OPENING.match(response)
        return bool(begun) and "</think>" not in response

    def _frame(self, roles: tuple[str, ...]) -> str:
        """What the template writes around the contents of these roles."""
        if roles not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            turns = tuple(Turn(role=role, content=_PLACEHOLDER) for role in roles)
            try:
                text = self._chat_text(turns, generate=True)
            except RowError:  # the template wants something of these contents
                text = ""
            self._frames[roles] = text.replace(_PLACEHOLDER, "\0")
        return self._frames[roles]

    def _response_text(
        self,
        turns: tuple[Turn, ...],
        response: str,
        *,
        ended: bool = True,
        prompt: str | None = None,
    ) -> str:
        """The text after the generation prompt, for `response`, up to and including its end token.

        The generation prompt may open a thought, which the response then closes. Without `ended`
        the text stops with the response's last word. `prompt` is the generation prompt of these
        turns, where it is known.
        """
        if not ended and self._is_open_thought(response):
            # Cut off within its thought: what the model wrote after the prompt, as it is.
            opened = OPENING.match(response) if self._opening else None
            return response[opened.end() :] if opened else response
        if prompt is None:
            prompt = self._chat_text(turns, generate=True)
        start = prompt.removesuffix(self._opening)
        if prompt.rstrip().endswith("</think>"):
            response = self._without_thought(response)
        if self._opening:
            response = with_opened_thought(response)
        tail = self._tail(start, prompt, turns, response)
        thought = REASONING.fullmatch(response)
        lost = response.strip() not in tail
        if not lost and loses_indentation(response, tail):
            raise RowError("malformed", _INDENTATION.format("the response"))
        if lost and (thought is None or thought["rest"].strip() not in tail):
            raise RowError("malformed", "the chat template changes the response")
        if lost and thought is not None:
            lost = thought["thought"].strip() not in tail
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
            before = EMPTY_THOUGHT.sub("", before).removesuffix("</think>")
            tail = before + response.strip() + after
        if self._opening:
            tail = after_opening(tail)
        end = tail.rfind(self._end_text) if self._end_text is not None else -1
        said = tail[:end] if end >= 0 else tail
        if not bare(said):
            raise RowError("empty", "the response is empty without its reasoning")
        self._check_nothing_added(said, response if thought is None else thought["rest"])
        if not ended:
            last = response.strip()[-1:]
            return said[: said.rfind(last) + 1]
        return tail[: end + len(self._end_text or "")] if end >= 0 else tail

    def _without_thought(self, response: str) -> str:
        """The response after a prompt that has closed its thought, as `enable_thinking: false`."""
        thought = REASONING.fullmatch(response)
        if thought is None:
            return response
        if thought["thought"].strip() and self._reasoning != "drop":
            raise RowError(
                "malformed",
                "the generation prompt ends its thought (as enable_thinking: false does), and the"
                " response has another: set data.reasoning=drop to train on the rest, or let the"
                " template begin a thought",
            )
        return thought["rest"].lstrip("\n")

    def _check_nothing_added(self, said: str, response: str) -> None:
        """Around a response stands what stands around every response, and thoughts."""
        if self._around is None:  # found by this probe
            return
        before, after = self._around
        whole = bare(before + response + after)
        # Thoughts stand before the answer; an answer of nothing but thoughts adds nothing.
        only_thought = not bare(response)
        if bare(said) != whole and not (
            only_thought or ("</think>" in said and bare(said).endswith(bare(response + after)))
        ):
            raise RowError(
                "malformed",
                f"the chat template adds text to the response, which becomes {_shortened(said)!r}",
            )

    def _tail(self, start: str, prompt: str, turns: tuple[Turn, ...], response: str) -> str:
        """What the template writes after `start` for an assistant turn."""
        conversation = self._chat_text(
            (*turns, Turn(role="assistant", content=response)), generate=False
        )
        if not conversation.startswith(start):
            if (tail := self._tail_alone(conversation, response)) is not None:
                return tail
            raise RowError(
                "malformed",
                "the chat template's prompt is not a prefix of the whole conversation:"
                f" the prompt ends in {prompt[-60:]!r}, the conversation has"
                f" {conversation[max(0, len(prompt) - 60) : len(prompt) + 20]!r} there",
            )
        return conversation[len(start) :]

    def _tail_alone(self, conversation: str, response: str) -> str | None:
        """The end of a conversation whose beginning the template writes in another way.

        Mistral's puts the system message into the last user message, which is then an earlier one.
        What engines give to the model is the prompt, so its response is learned after the prompt.
        """
        if self._around is None or self._opening:
            return None
        tail = self._around[0] + response.strip()
        found = conversation.rfind(tail)
        return conversation[found:] if found >= 0 else None

    @property
    def writes_date(self) -> bool:
        """Whether prompts depend on `data.time`."""
        if not isinstance(self._template, ChatTemplate):
            return False
        turns = self._with_system((Turn(role="user", content="probe"),))
        later = self._time + timedelta(days=400)
        now, then = (
            self._chat_text(turns, generate=True, time=time) for time in (self._time, later)
        )
        return now != then

    def _chat_text(
        self, turns: tuple[Turn, ...], *, generate: bool, time: datetime | None = None
    ) -> str:
        assert isinstance(self._template, ChatTemplate)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        # Templates that write the date call strftime_now; its own clock would change with the day.
        variables: dict[str, Any] = {
            **self._template.variables,
            "strftime_now": (time or self._time).strftime,
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

    def _turn_markers(self) -> set[str]:
        """Added tokens with which the template marks turns, also those that are not special."""
        probe = (Turn(role="user", content="a"), Turn(role="assistant", content="b"))
        try:
            text = self._chat_text(self._with_system(probe), generate=False)
            text += self._chat_text(self._with_system(probe[:1]), generate=True)
        except Exception:  # what the template refuses is named by the probe
            return set()
        added = self._tokenizer.added_tokens_decoder
        found = {added[index].content for index in self._encode(text) if index in added}
        return {token for token in found if token.strip() and not TAG.fullmatch(token)}

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
            ignored = prompt == self._chat_text(turns, generate=False)
        except RowError as error:
            raise DataError(f"data.template: {error.reason} (tokenizer of {name})") from error
        except Exception as error:  # a template is code of the user's model
            raise DataError(
                f"data.template: the chat template of {name} fails on a plain conversation:"
                f" {type(error).__name__}: {error}"
            ) from error
        before, _, after = tail.rpartition(response)
        end = self._control.search(after) if self._control.pattern else None
        self._around = (before, after[: end.start()] if end else after)
        self._check_around(*self._around, ignored=ignored, name=name)
        if end is None:
            return self._require_eos()
        self._end_text = end[0]
        index = self._tokenizer.convert_tokens_to_ids(end[0])
        assert isinstance(index, int)
        return index

    def _check_around(self, before: str, after: str, *, ignored: bool, name: str) -> None:
        """What stands around a response is learned with it.

        Before it may stand the tokens of a channel, which the model itself writes.
        """
        if ignored and bare(before):
            raise DataError(
                f"data.template: the chat template of {name} ignores add_generation_prompt: every"
                f" response would begin with {before!r}, which engines write into the prompt;"
                " correct the template"
            )
        channel = self._control.pattern and self._control.search(before)
        for text in ("" if channel else bare(before), bare(after)):
            if text:
                raise DataError(
                    f"data.template: the chat template of {name} adds {text!r} to every response:"
                    " the student would learn to say it; correct the template"
                )

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
        return opening if OPENING.fullmatch(opening) and conversation.startswith(start) else ""

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
        prompt_ids = self.bos_ids + self._encode(text)
        references = [
            self._ended(
                self._continue(text, prompt_ids, response, num_special=len(self.bos_ids)),
                truncated=example.truncated,
            )
            for response in example.references
        ]
        return _single_turn(prompt_ids, references)

    # ---- tokens ----

    def _encode(self, text: str) -> list[int]:
        found: Any = self._tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(found["input_ids"])

    def _continue(
        self, text: str, ids: list[int], addition: str, *, num_special: int = 0
    ) -> list[int]:
        """Tokens of `addition` after `text`, whose tokens `ids` are kept.

        If the tokenizer would merge tokens across the border, `addition` is tokenized without
        `text`: generation also starts from exactly the tokens of `text`. Then it follows an anchor,
        because some tokenizers put a space before the first word of whatever they get.
        """
        for before, known in chain([self._last_part(text, ids[num_special:])], self._anchors()):
            whole = self._encode(before + addition)
            if whole[: len(known)] == known:
                return whole[len(known) :]
        return self._encode(addition)

    def _last_part(self, text: str, ids: list[int]) -> tuple[str, list[int]]:
        """`text` from its last added token on, with that part of its tokens `ids`.

        A fast tokenizer cuts a text at its added tokens, and encodes every part alone: what follows
        `text` is tokenized alike after its last part, which is short. The whole `text` where it has
        no added token, or its last part could be cut elsewhere if another text followed.
        """
        added = self._added
        last = next((at for at in range(len(ids) - 1, -1, -1) if ids[at] in added), None)
        if last is None:
            return text, ids
        part = text[text.rfind(added[ids[last]]) :]
        if part not in self._parts:
            if len(self._parts) >= _MAX_PARTS:
                self._parts.clear()
            crossed = any(part in token for token in added.values() if token != part)
            self._parts[part] = None if crossed else self._encode(part)
        known = ids[last:]
        return (part, known) if self._parts[part] == known else (text, ids)

    def _anchors(self) -> Iterator[tuple[str, list[int]]]:
        for anchor in ("\n", ".", "a"):
            yield anchor, self._encode(anchor)

    def _ended(self, ids: list[int], *, truncated: bool) -> list[int]:
        """The response with its end token, which must not occur earlier in it.

        A truncated one gets none: the model was not at an end.
        """
        if truncated:
            ended = [*ids, -1]
        else:
            ended = ids if ids[-1:] == [self.end_token_id] else [*ids, self.end_token_id]
        if self.end_token_id in ended[:-1]:
            raise RowError(
                "malformed",
                f"the response contains the end token"
                f" {self._tokenizer.convert_ids_to_tokens(self.end_token_id)!r}, which would stop"
                " generation there",
            )
        return ids if truncated else ended

    def _require_eos(self) -> int:
        if self._eos_token_id is None:
            raise DataError(
                f"the tokenizer of {self._tokenizer.name_or_path} has no eos_token: responses would"
                " have no end token and the student would never learn to stop"
            )
        return self._eos_token_id


def _single_turn(prompt_ids: list[int], reference_ids: list[list[int]]) -> RenderedExample:
    response_ids = reference_ids[0] if reference_ids else []
    return RenderedExample(
        prompt_ids=prompt_ids,
        reference_ids=reference_ids,
        demonstration_prompt_ids=prompt_ids,
        demonstration_response_ids=response_ids,
        demonstration_loss_mask=[True] * len(response_ids),
    )


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _id_or_none(value: Any) -> int | None:
    return value if isinstance(value, int) else None
