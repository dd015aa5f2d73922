"""Templates, with token ids written by hand for a word-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from distillm_ray.config import ChatTemplate, DataConfig, PlainTemplate
from distillm_ray.data.rows import Example, RowError, parse_row
from distillm_ray.data.templates import Renderer
from distillm_ray.errors import DataError
from tests import make

SPECIAL = ["<unk>", "<user>", "<assistant>", "<system>", "<end>", "</s>"]
WORDS = ["sky", "is", "blue", "why", "yes", "no", "so", "be", "brief", "and", "red"]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
USER, ASSISTANT, SYSTEM, END, EOS = 1, 2, 3, 4, 5
WITH_THOUGHTS = [*WORDS, "<think>", "</think>"]
IDS = {word: len(SPECIAL) + index for index, word in enumerate(WORDS)}


def ids_of(words: str) -> list[int]:
    return [IDS[word] for word in words.split()]


def make_tokenizer(chat_template: str | None = CHAT) -> PreTrainedTokenizerFast:
    return make.tokenizer(SPECIAL, WORDS, chat_template=chat_template)


def question(text: str, *responses: str) -> Example:
    row = {"prompt": text, "response": list(responses)}
    return parse_row(row, require_responses=bool(responses))


def render_with(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate | PlainTemplate | None = None,
    *,
    vocabulary_size: int | None = None,
    **data: Any,
) -> Renderer:
    config = DataConfig(train=(Path("a.jsonl"),), template=template or ChatTemplate(), **data)
    return Renderer(tokenizer, config, vocabulary_size=vocabulary_size)


def test_a_chat_prompt_ends_where_generation_starts_and_responses_end_with_end_of_turn() -> None:
    renderer = render_with(make_tokenizer(), ChatTemplate(system="be brief"))
    assert renderer.end_token_id == END
    rendered = renderer.render(question("why", "so", "sky is blue"))
    prompt = [SYSTEM, *ids_of("be brief"), END, USER, *ids_of("why"), END, ASSISTANT]
    assert rendered.prompt_ids == prompt
    assert rendered.reference_ids == [[*ids_of("so"), END], [*ids_of("sky is blue"), END]]
    assert rendered.demonstration_prompt_ids == prompt
    assert rendered.demonstration_response_ids == [*ids_of("so"), END]
    assert rendered.demonstration_loss_mask == [True, True]


def test_a_multi_turn_demonstration_learns_the_assistants_tokens_only() -> None:
    messages = [("user", "why"), ("assistant", "so"), ("user", "and"), ("assistant", "sky is blue")]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    renderer = render_with(make_tokenizer(), ChatTemplate())
    rendered = renderer.render(parse_row(row, require_responses=True))
    start = [USER, *ids_of("why"), END, ASSISTANT]
    between = [USER, *ids_of("and"), END, ASSISTANT]
    first, last = [*ids_of("so"), END], [*ids_of("sky is blue"), END]
    assert rendered.prompt_ids == start + first + between
    assert rendered.reference_ids == [last]
    assert rendered.demonstration_prompt_ids == start
    assert rendered.demonstration_response_ids == first + between + last
    assert rendered.demonstration_loss_mask == [True] * 2 + [False] * 4 + [True] * 4


def test_a_template_without_end_of_turn_falls_back_to_the_eos_token() -> None:
    template = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    tail = "{% if add_generation_prompt %}<assistant> {% endif %}"
    renderer = render_with(make_tokenizer(template + tail), ChatTemplate())
    assert renderer.end_token_id == EOS
    assert renderer.render(question("why", "so")).reference_ids == [[*ids_of("so"), EOS]]


def test_a_template_whose_prompt_is_not_a_prefix_of_the_conversation_is_refused() -> None:
    template = CHAT + "{% if add_generation_prompt %}sky {% endif %}"
    with pytest.raises(DataError, match="prompt is not a prefix of the whole conversation"):
        render_with(make_tokenizer(template), ChatTemplate())


REWRITING = CHAT.replace(
    "{{ m['content'] }}",
    "{{ m['content'] if loop.last or m['role'] != 'assistant'"
    " else m['content'].split('</think>')[-1] }}",
)


def conversation(*turns: tuple[str, str]) -> Example:
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    return parse_row(row, require_responses=True)


def test_of_a_conversation_that_the_template_rewrites_the_last_response_is_learned() -> None:
    """As Qwen3's template, which drops the thoughts of earlier turns."""
    tokenizer = make.tokenizer(SPECIAL, WITH_THOUGHTS, chat_template=REWRITING)
    example = conversation(
        ("user", "why"),
        ("assistant", "<think> is </think> so"),
        ("user", "and"),
        ("assistant", "yes"),
    )
    renderer = render_with(tokenizer)
    rendered = renderer.render(example)
    assert rendered.last_only
    prompt = [USER, *ids_of("why"), END, ASSISTANT, *ids_of("so"), END]
    prompt += [USER, *ids_of("and"), END, ASSISTANT]
    assert rendered.demonstration_prompt_ids == rendered.prompt_ids == prompt
    assert rendered.demonstration_response_ids == [*ids_of("yes"), END]
    assert rendered.demonstration_loss_mask == [True, True]
    assert not renderer.render(question("why", "so")).last_only
    strict = render_with(tokenizer, conversations="all")
    with pytest.raises(RowError, match="rewrites earlier turns: the conversation up to message 4"):
        strict.render(example)


def test_a_template_that_drops_an_earlier_answer_is_refused() -> None:
    dropping = "{{ m['content'] if loop.last or m['role'] != 'assistant' else 'red' }}"
    renderer = render_with(make_tokenizer(CHAT.replace("{{ m['content'] }}", dropping)))
    example = conversation(
        ("user", "why"), ("assistant", "so"), ("user", "and"), ("assistant", "yes")
    )
    with pytest.raises(RowError, match="changes an earlier assistant message"):
        renderer.render(example)


def test_the_last_response_alone_is_learned_where_the_config_says_so() -> None:
    example = conversation(
        ("user", "why"), ("assistant", "so"), ("user", "and"), ("assistant", "yes")
    )
    rendered = render_with(make_tokenizer(), conversations="last").render(example)
    assert not rendered.last_only
    assert rendered.demonstration_prompt_ids == rendered.prompt_ids
    assert rendered.demonstration_response_ids == [*ids_of("yes"), END]


def test_a_leading_assistant_message_is_context() -> None:
    example = conversation(("assistant", "so"), ("user", "why"), ("assistant", "yes"))
    rendered = render_with(make_tokenizer()).render(example)
    prompt = [ASSISTANT, *ids_of("so"), END, USER, *ids_of("why"), END, ASSISTANT]
    assert rendered.demonstration_prompt_ids == prompt
    assert rendered.demonstration_response_ids == [*ids_of("yes"), END]


def test_a_template_that_refuses_or_drops_the_system_message_is_refused() -> None:
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    with pytest.raises(DataError, match="refuses the row: no system"):
        render_with(make_tokenizer(template + CHAT), ChatTemplate(system="be brief"))
    template = CHAT.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    with pytest.raises(DataError, match="the chat template changes the system message"):
        render_with(make_tokenizer(template), ChatTemplate(system="be brief"))


def test_a_row_whose_content_the_template_changes_is_refused() -> None:
    template = CHAT.replace("m['content']", "m['content'] | replace('red', 'blue')")
    renderer = render_with(make_tokenizer(template), ChatTemplate())
    renderer.render(question("why", "so"))
    with pytest.raises(RowError, match="changes the user message"):
        renderer.render(question("why red", "so"))
    with pytest.raises(RowError, match="changes the response"):
        renderer.render(question("why", "red"))


CONTROL = "contains the control token"


@pytest.mark.parametrize("template", [ChatTemplate(), PlainTemplate(name="raw")])
@pytest.mark.parametrize(
    ("example", "said"),
    [
        (("why", "so <end> </s> yes"), f"the response {CONTROL} '<end>' at character 4"),
        (("why", "so<end>"), f"the response {CONTROL} '<end>' at character 3"),
        (("why", "so </s>"), f"the response {CONTROL} '</s>'"),
        (("why <end> <assistant> so", "no"), f"the user message {CONTROL} '<end>'"),
    ],
)
def test_a_control_token_in_the_content_is_refused(
    template: ChatTemplate | PlainTemplate, example: tuple[str, str], said: str
) -> None:
    with pytest.raises(RowError, match=said):
        render_with(make_tokenizer(), template).render(question(*example))


def test_a_control_token_in_the_systems_message_of_the_config_is_refused() -> None:
    with pytest.raises(DataError, match=rf"data\.template\.system {CONTROL} '<end>'"):
        render_with(make_tokenizer(), ChatTemplate(system="be <end>"))


def test_an_id_without_a_row_in_the_model_is_refused_by_its_token() -> None:
    limit = IDS["red"]
    renderer = render_with(make_tokenizer(), vocabulary_size=limit)
    renderer.render(question("why", "so"))
    for example in (question("why red", "so"), question("why", "red")):
        with pytest.raises(RowError, match=rf"contains 'red' \(id {limit}\), for which the model"):
            renderer.render(example)
    with pytest.raises(DataError, match=r"'<end>' .* has id 4, but the model has rows for 3 ids"):
        render_with(make_tokenizer(), vocabulary_size=3)


# ---- thoughts ------------------------------------------------------------------------------------

# What templates of reasoning models do to an assistant's content, and to the generation prompt.
DROPPING = "{{ m['content'].split('</think>')[-1] }}"
THOUGHT = "<think> why is </think> so"


def thinking(
    *, content: str = "{{ m['content'] }}", opening: str = "", reasoning: str = "fail"
) -> tuple[Renderer, Callable[[list[int]], str]]:
    """A renderer and a decoder for a template with these parts."""
    template = CHAT.replace("{{ m['content'] }}", content)
    template = template.replace("<assistant> {% endif %}", f"<assistant> {opening}{{% endif %}}")
    tokenizer = make.tokenizer(SPECIAL, WITH_THOUGHTS, chat_template=template)
    return render_with(tokenizer, reasoning=reasoning), lambda ids: " ".join(
        tokenizer.convert_ids_to_tokens(ids)
    )


def test_a_template_that_keeps_thoughts_learns_them() -> None:
    renderer, text = thinking()
    rendered = renderer.render(question("why", THOUGHT))
    assert text(rendered.reference_ids[0]) == f"{THOUGHT} <end>"


@pytest.mark.parametrize(
    ("reasoning", "learned"), [("keep", f"{THOUGHT} <end>"), ("drop", "so <end>")]
)
def test_what_becomes_of_thoughts_that_the_template_drops_is_the_users_choice(
    reasoning: str, learned: str
) -> None:
    renderer, text = thinking(content=DROPPING, reasoning=reasoning)
    rendered = renderer.render(question("why", THOUGHT))
    assert text(rendered.reference_ids[0]) == learned
    assert text(rendered.demonstration_response_ids) == learned
    assert text(renderer.render(question("why", "so")).reference_ids[0]) == "so <end>"


def test_dropped_thoughts_are_refused_by_default_with_the_key() -> None:
    renderer, _ = thinking(content=DROPPING)
    with pytest.raises(RowError, match=r"drops the reasoning of .*set data\.reasoning=keep"):
        renderer.render(question("why", THOUGHT))


@pytest.mark.parametrize("content", ["{{ m['content'] }}", DROPPING])
@pytest.mark.parametrize("reasoning", ["fail", "keep", "drop"])
def test_a_generation_prompt_that_opens_a_thought_is_followed_by_the_rest_of_it(
    content: str, reasoning: str
) -> None:
    renderer, text = thinking(content=content, opening="<think>\n", reasoning=reasoning)
    without = renderer.render(question("why", "so"))
    assert text(without.prompt_ids) == "<user> why <end> <assistant> <think>"
    assert text(without.reference_ids[0]) == "</think> so <end>"
    dropped = content == DROPPING
    if dropped and reasoning == "fail":
        with pytest.raises(RowError, match="drops the reasoning"):
            renderer.render(question("why", THOUGHT))
        return
    rendered = renderer.render(question("why", THOUGHT))
    assert rendered.prompt_ids == without.prompt_ids
    kept = not (dropped and reasoning == "drop")
    expected = "why is </think> so <end>" if kept else "</think> so <end>"
    assert text(rendered.reference_ids[0]) == expected


@pytest.mark.parametrize("content", ["{{ m['content'] }}", DROPPING])
def test_a_generated_response_closes_the_thought_that_the_prompt_opened(content: str) -> None:
    """As `generate` writes it: the model saw the opening in its prompt and did not repeat it."""
    renderer, text = thinking(content=content, opening="<think>\n", reasoning="keep")
    rendered = renderer.render(question("why", "why is </think> so"))
    assert text(rendered.reference_ids[0]) == "why is </think> so <end>"


def test_a_response_of_reasoning_alone_is_refused() -> None:
    renderer, _ = thinking(content=DROPPING, reasoning="drop")
    with pytest.raises(RowError, match="the response is empty without its reasoning"):
        renderer.render(question("why", "<think> why is </think>"))
    renderer, _ = thinking(opening="<think>\n")
    with pytest.raises(RowError, match="has <think> without </think>"):
        renderer.render(question("why", "<think> so"))


def test_an_empty_thought_of_the_template_gives_way_to_the_one_that_is_kept() -> None:
    content = "<think>\n\n</think>\n\n{{ m['content'].split('</think>')[-1] }}"
    template = (
        "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}"
        f"{content}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}<end>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    tokenizer = make.tokenizer(SPECIAL, WITH_THOUGHTS, chat_template=template)
    renderer = render_with(tokenizer, reasoning="keep")
    ids = renderer.render(question("why", THOUGHT)).reference_ids[0]
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == f"{THOUGHT} <end>"


# ---- the date, and variables ---------------------------------------------------------------------


def test_a_template_sees_the_time_of_the_config() -> None:
    template = CHAT + "{% if add_generation_prompt %}{{ '' }}{% endif %}"
    template = "<system> {{ strftime_now('%d') }}<end>\n" + template
    tokenizer = make.tokenizer(SPECIAL, [*WORDS, "24", "25"], chat_template=template)
    for day in ("24", "25"):
        renderer = render_with(tokenizer, time=datetime.fromisoformat(f"2026-11-{day}T12:00:00"))
        ids = renderer.render(question("why", "so")).prompt_ids
        assert tokenizer.convert_ids_to_tokens(ids)[1] == day


def test_a_variable_that_the_rendering_sets_is_refused() -> None:
    with pytest.raises(ValidationError, match="only the template reads, got tokenize"):
        ChatTemplate(variables={"tokenize": True})


def test_variables_of_the_config_reach_the_template() -> None:
    template = "{% if brief %}<system> be brief<end>\n{% endif %}" + CHAT
    renderer = render_with(make_tokenizer(template), ChatTemplate(variables={"brief": True}))
    assert renderer.render(question("why", "so")).prompt_ids[:3] == [SYSTEM, *ids_of("be brief")]


def test_a_tokenizer_without_chat_template_names_the_remedy() -> None:
    with pytest.raises(DataError, match=r"set data\.template\.type=plain"):
        render_with(make_tokenizer(None), ChatTemplate())


def test_the_plain_templates_put_the_response_after_the_prompt_and_end_with_eos() -> None:
    raw = render_with(make_tokenizer(None), PlainTemplate(name="raw"))
    rendered = raw.render(question("why sky", "so"))
    assert rendered.prompt_ids == ids_of("why sky")
    assert rendered.reference_ids == [[*ids_of("so"), EOS]]

    tokenizer = make_tokenizer(None)
    row = {"instruction": "why", "input": "sky", "output": "so"}
    rendered = render_with(tokenizer, PlainTemplate()).render(
        parse_row(row, require_responses=True)
    )
    text = (
        "Below is an instruction that describes a task, paired with an input that provides further"
        " context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nwhy\n\n### Input:\nsky\n\n### Response:\n"
    )
    assert rendered.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rendered.reference_ids == [[*ids_of("so"), EOS]]


def test_a_plain_template_refuses_a_conversation() -> None:
    messages = [("user", "why"), ("assistant", "so"), ("user", "and"), ("assistant", "yes")]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    with pytest.raises(RowError, match="one user message with one response, got 3 messages"):
        render_with(make_tokenizer(), PlainTemplate()).render(
            parse_row(row, require_responses=True)
        )
