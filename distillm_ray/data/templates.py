"""Renders an `Example` into token ids, with the tokenizer's chat template or a plain template.

Every response ends with the token that stops generation, so that the student learns to stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from distillm_ray.config import ChatTemplate, PlainTemplate
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedExample:
    """Token ids of one example.

    A demonstration is prompt and first reference. In multi-turn rows its response starts at the
    first assistant turn instead of the last, so that every assistant turn is learned.
    """

    prompt_ids: list[int]  # up to the last assistant turn, ready for generation
    reference_ids: list[list[int]]  # each with its end token
    demonstration_prompt_ids: list[int]  # up to the first assistant turn
    demonstration_response_ids: list[int]  # the rest; empty without a reference
    demonstration_loss_mask: list[bool]  # True on assistant tokens, their end tokens included


class Renderer:
    """Applies one template with one tokenizer. Picklable, because Ray Data sends it to its tasks.

    `end_token_id` ends every response, and generators must stop at it. It is the chat template's
    end-of-turn token, or the tokenizer's `eos_token` if the template has none.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | PlainTemplate
    ) -> None:
        """Check the template on a probe conversation.

        Raises:
            DataError: there is no chat template or no end token, the template refuses or drops the
                system message, or its prompt is not a prefix of its conversation.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._eos_token_id = _id_or_none(tokenizer.eos_token_id)
        self._end_text: str | None = None
        empty: Any = tokenizer("")["input_ids"]
        bos = _id_or_none(tokenizer.bos_token_id)
        self._bos_ids = [bos] if bos is not None and list(empty)[:1] == [bos] else []
        match template:
            case ChatTemplate():
                self.end_token_id = self._probe_chat_template()
            case PlainTemplate():
                self.end_token_id = self._require_eos()

    def render(self, example: Example) -> RenderedExample:
        """Token ids of the prompt, its references and its demonstration.

        Raises:
            RowError: the template cannot express this row, changes its content, or rewrites its
                earlier turns; or a response contains the end token.
        """
        match self._template:
            case ChatTemplate():
                return self._render_chat(example)
            case PlainTemplate(name=name):
                return self._render_plain(example, name)

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
        if not reference_ids or not any(turn.role == "assistant" for turn in turns):
            return _single_turn(prompt_ids, reference_ids)
        return self._render_multi_turn(turns, example.references[0], prompt_ids, reference_ids)

    def _render_multi_turn(
        self,
        turns: tuple[Turn, ...],
        reference: str,
        prompt_ids: list[int],
        reference_ids: list[list[int]],
    ) -> RenderedExample:
        if self._end_text is None:
            raise RowError(
                "malformed",
                "the chat template does not mark the end of an assistant turn, so rows with several"
                " turns cannot be trained on",
            )
        conversation = (*turns, Turn(role="assistant", content=reference))
        assistant_turns = [i for i, turn in enumerate(conversation) if turn.role == "assistant"]
        text = self._chat_text(conversation[: assistant_turns[0]], generate=True)
        ids = self._encode(text)
        num_prompt = len(ids)
        mask: list[bool] = []
        for index in assistant_turns:
            before = self._chat_text(conversation[:index], generate=True)
            response = self._response_text(conversation[:index], conversation[index].content)
            if not before.startswith(text):
                raise RowError(
                    "malformed",
                    f"the chat template rewrites earlier turns: the conversation up to message"
                    f" {index + 1} does not begin with the turns before it, so its tokens cannot"
                    " be learned in one sequence",
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
            # Not the assistant's: templates may drop the reasoning of earlier turns.
            if turn.role in ("system", "user") and not _contains(text, turn.content):
                raise RowError("malformed", f"the chat template changes the {turn.role} message")
        return text

    def _response_text(self, turns: tuple[Turn, ...], response: str) -> str:
        """The text that the template adds for `response`, up to and including its end token."""
        prompt = self._chat_text(turns, generate=True)
        conversation = self._chat_text(
            (*turns, Turn(role="assistant", content=response)), generate=False
        )
        if not conversation.startswith(prompt):
            raise RowError(
                "malformed",
                "the chat template's prompt is not a prefix of the whole conversation:"
                f" the prompt ends in {prompt[-60:]!r}, the conversation has"
                f" {conversation[max(0, len(prompt) - 60) : len(prompt) + 20]!r} there",
            )
        tail = conversation[len(prompt) :]
        if not _contains(tail, response):
            raise RowError("malformed", "the chat template changes the response")
        if self._end_text is not None and (end := tail.rfind(self._end_text)) >= 0:
            return tail[: end + len(self._end_text)]
        return tail

    def _chat_text(self, turns: tuple[Turn, ...], *, generate: bool) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate
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
        response = "probe"
        turns = self._with_system((Turn(role="user", content="probe"),))
        try:
            self._prompt_text(turns)
            tail = self._response_text(turns, response)
        except RowError as error:
            raise DataError(
                f"data.template: {error.reason} (tokenizer of {self._tokenizer.name_or_path})"
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
