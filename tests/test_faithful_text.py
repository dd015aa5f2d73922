"""What is learned says what the row says: templates and tokenizers that change it are refused."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from distillm_ray.config import DataConfig, PlainTemplate
from distillm_ray.data.decoding import decode_ids, spoken
from distillm_ray.data.rows import RowError, parse_row
from distillm_ray.data.template_difference import template_difference
from distillm_ray.data.templates import RenderedExample, Renderer
from distillm_ray.errors import DataError
from tests import make

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RAW = PlainTemplate(name="raw")


def renderer(tokenizer: PreTrainedTokenizerFast, **data: Any) -> Renderer:
    return Renderer(tokenizer, DataConfig.model_validate({"train": [Path("a.jsonl")]} | data))


def with_template(template: str) -> Renderer:
    return renderer(make.byte_tokenizer(chat_template=template))


def render(one: Renderer, **row: Any) -> RenderedExample:
    return one.render(parse_row(row, require_responses=True))


def metaspace_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """As Llama 2's: a space before the first word of every text, and none when it is read back."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram

    pieces = [("<unk>", 0.0), ("</s>", 0.0)]
    pieces += [(piece, -float(len(words) - len(piece))) for piece in words]
    backend = Tokenizer(Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)  # type: ignore[assignment]
    backend.decoder = decoders.Metaspace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


# ---- templates -----------------------------------------------------------------------------------


def test_white_space_within_a_text_must_be_kept() -> None:
    collapsing = with_template(CHATML.replace("m['content']", "m['content'].split() | join(' ')"))
    render(collapsing, prompt="def f", response="one line")
    with pytest.raises(RowError, match="changes the response"):
        render(collapsing, prompt="def f", response="if x:\n    y")
    with pytest.raises(RowError, match="changes the user message"):
        render(collapsing, prompt="if x:\n    y", response="no")


def test_white_space_around_a_text_may_be_trimmed() -> None:
    trimming = with_template(CHATML.replace("m['content']", "m['content'] | trim"))
    rendered = render(trimming, prompt=" why\n", response="\n so ")
    assert (
        rendered.demonstration_response_ids[:2]
        == render(trimming, prompt="why", response="so").demonstration_response_ids[:2]
    )


def test_a_dropped_system_message_is_found_though_the_user_says_the_same() -> None:
    dropping = with_template(
        CHATML.replace("for m in messages", "for m in messages if m['role'] != 'system'")
    )
    with pytest.raises(RowError, match="changes the system message"):
        render(dropping, system="brief", prompt="be brief", response="ok")


@pytest.mark.parametrize("added", ["{{ m['content'] }} (end)", "Well, {{ m['content'] }}"])
def test_a_template_that_adds_words_to_every_response_is_refused(added: str) -> None:
    adding = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}" + added + "{% else %}{{ m['content'] }}{% endif %}",
    )
    with pytest.raises(DataError, match=r"adds '(\(end\)|Well,)' to every response"):
        with_template(adding)


def test_a_template_that_adds_words_to_some_responses_is_refused_by_row() -> None:
    adding = with_template(
        CHATML.replace(
            "{{ m['content'] }}",
            "{{ m['content'] }}"
            "{% if m['role'] == 'assistant' and '?' in m['content'] %} Hm.{% endif %}",
        )
    )
    render(adding, prompt="why", response="so")
    with pytest.raises(RowError, match="adds text to the response"):
        render(adding, prompt="why", response="so?")


def test_a_template_that_ignores_the_generation_prompt_is_refused() -> None:
    ignoring = CHATML.replace("{% if add_generation_prompt %}", "{% if false %}")
    with pytest.raises(DataError, match="ignores add_generation_prompt"):
        with_template(ignoring)


def test_a_template_whose_prompt_ends_with_the_user_needs_no_generation_prompt() -> None:
    mistral = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    rendered = render(with_template(mistral), prompt="why", response="so")
    tokenizer = make.byte_tokenizer()
    assert decode_ids(tokenizer, rendered.demonstration_response_ids) == " so<|im_end|>"


def test_channels_that_the_model_writes_are_learned() -> None:
    channels = CHATML.replace(
        "\n{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}<|endoftext|>final<|im_start|>{% else %}\n{% endif %}"
        "{{ m['content'] }}",
    ).replace("assistant\n{% endif %}", "assistant{% endif %}")
    rendered = render(with_template(channels), prompt="why", response="so")
    said = decode_ids(make.byte_tokenizer(), rendered.demonstration_response_ids)
    assert said == "<|endoftext|>final<|im_start|>so<|im_end|>"


def test_turn_markers_that_are_not_special_tokens_are_control_tokens() -> None:
    tokenizer = make.byte_tokenizer(
        ["<|endoftext|>"],
        text_tokens=["<think>", "</think>", "<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )
    one = renderer(tokenizer)
    assert one.end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(RowError, match=r"control token '<\|im_end\|>'"):
        render(one, prompt="why", response="so<|im_end|>yes")
    render(one, prompt="why", response="<think>\na\n</think>\n\nso")


def learned(one: Renderer, **row: Any) -> str:
    rendered = render(one, **row)
    return decode_ids(make.byte_tokenizer(), rendered.demonstration_response_ids)


def test_the_indentation_of_code_must_be_kept() -> None:
    trimming = with_template(CHATML.replace("m['content']", "m['content'] | trim"))
    code = "    y = 1\n    return y"
    with pytest.raises(RowError, match="removes the indentation of the first line of the response"):
        render(trimming, prompt="def f():", response=code)
    with pytest.raises(RowError, match="first line of the user message"):
        render(trimming, prompt=code, response="two lines")
    assert learned(with_template(CHATML), prompt="f", response=code) == f"{code}<|im_end|>"
    assert learned(trimming, prompt="f", response=" so\n so") == "so\n so<|im_end|>"


def test_a_dropped_message_is_found_though_the_template_says_the_same() -> None:
    dropping = with_template(
        "Today is 2.\n"
        + CHATML.replace("for m in messages", "for m in messages if m['role'] != 'tool'")
    )
    messages = [
        {"role": "user", "content": "1 + 1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    with pytest.raises(RowError, match="changes the tool message"):
        render(dropping, messages=messages)


def test_a_template_that_moves_the_system_message_is_learned_after_the_prompt() -> None:
    """As Mistral's: the system message stands in the last user message."""
    moving = with_template(
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if m['role'] == 'user' %}[INST] "
        "{% if loop.last and system is defined %}{{ system }}\n\n{% endif %}"
        "{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    )
    turns = [("system", "be brief"), ("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages.append({"role": "assistant", "content": "d"})
    rendered = render(moving, messages=messages)
    tokenizer = make.byte_tokenizer()
    assert rendered.last_only
    assert decode_ids(tokenizer, rendered.demonstration_response_ids) == " d<|im_end|>"
    assert decode_ids(tokenizer, rendered.prompt_ids).endswith("[INST] be brief\n\nc[/INST]")


def test_an_earlier_answer_that_cannot_be_rendered_leaves_the_last_to_learn() -> None:
    adding = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}"
        "{% if m['role'] == 'assistant' and '?' in m['content'] %} Hm.{% endif %}",
    )
    turns = [("user", "a"), ("assistant", "b?"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert render(with_template(adding), **row).last_only
    every = renderer(make.byte_tokenizer(chat_template=adding), conversations="all")
    with pytest.raises(RowError, match=r"message 2: .* adds text"):
        render(every, **row)


# ---- thoughts ------------------------------------------------------------------------------------

OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
DROPPING = "{{ m['content'].split('</think>')[-1] }}"


def opened(answer: str, **data: Any) -> Renderer:
    """A template whose prompt opens a thought, and which writes answers so."""
    template = OPENED.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}" + answer + "{% else %}{{ m['content'] }}{% endif %}",
    )
    return renderer(make.byte_tokenizer(chat_template=template), **data)


@pytest.mark.parametrize("response", ["4", "<think>\n\n</think>\n\n4"])
def test_an_answer_without_thoughts_closes_the_opened_thought_once(response: str) -> None:
    closed = opened(DROPPING)
    assert learned(closed, prompt="2 + 2", response=response) == "\n</think>\n\n4<|im_end|>"


def test_after_a_prompt_that_has_closed_its_thought_comes_no_other() -> None:
    """As Qwen3 with `enable_thinking: false`."""
    empty = "<think>\n\n</think>\n\n"
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and '</think>' not in m['content'] %}"
        + empty
        + "{% endif %}{{ m['content'] }}",
    ).replace("assistant\n{% endif %}", f"assistant\n{empty}{{% endif %}}")
    row = {"prompt": "2 + 2", "response": "<think>\ntwo twos\n</think>\n\n4"}
    with pytest.raises(RowError, match="ends its thought"):
        render(with_template(template), **row)
    dropping = renderer(make.byte_tokenizer(chat_template=template), reasoning="drop")
    assert learned(dropping, **row) == "4<|im_end|>"
    assert learned(with_template(template), prompt="2 + 2", response="4") == "4<|im_end|>"


def test_a_template_that_closes_the_thought_itself_is_not_closed_again() -> None:
    """As DeepSeek V3.1 with `thinking`."""
    closing = opened("</think>" + DROPPING)
    assert learned(closing, prompt="2 + 2", response="4") == "</think>4<|im_end|>"
    keeping = opened("</think>" + DROPPING, reasoning="keep")
    row = {"prompt": "2 + 2", "response": "<think>two twos</think>4"}
    assert learned(keeping, **row) == "two twos</think>4<|im_end|>"


@pytest.mark.parametrize("response", ["we ad", "<think>\nwe ad"])
def test_a_thought_that_was_cut_off_goes_on_after_the_prompt(response: str) -> None:
    row = {"prompt": "2 + 2", "response": response, "finish_reason": "length"}
    assert learned(opened(DROPPING), **row) == "we ad"
    plain = learned(with_template(CHATML), **row)
    assert plain == response


def test_an_addition_after_a_thought_is_found_too() -> None:
    adding = with_template(
        CHATML.replace(
            "{{ m['content'] }}",
            "{{ m['content'] }}"
            "{% if m['role'] == 'assistant' and '?' in m['content'] %} Hm.{% endif %}",
        )
    )
    with pytest.raises(RowError, match="adds text to the response"):
        render(adding, prompt="why", response="<think>a</think>so?")


def test_a_thought_that_the_tokenizer_lacks_is_refused() -> None:
    tokenizer = make.tokenizer(["<unk>", "</s>", "<think>", "</think>"], ["sky", "why"])
    with pytest.raises(RowError, match="control token"):
        render(renderer(tokenizer, template=RAW), prompt="why", response="<think> x </think> sky")
    from tokenizers import normalizers

    lower = make.byte_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    with pytest.raises(RowError, match="tokenizer changes the reasoning: 'Two'"):
        render(renderer(lower, template=RAW), prompt="a", response="<think>Two</think>four")


def test_an_earlier_answer_that_mentions_the_end_of_a_thought_is_not_cut() -> None:
    cutting = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' and not loop.last %}"
        + DROPPING
        + "{% else %}{{ m['content'] }}{% endif %}",
    )
    turns = [("user", "a"), ("assistant", "write </think> last"), ("user", "c"), ("assistant", "d")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    with pytest.raises(RowError, match="changes an earlier assistant message"):
        render(with_template(cutting), **row)
    turns[1] = ("assistant", "<think>b</think>so")
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert render(with_template(cutting), **row).last_only


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_text_that_the_tokenizer_lacks_is_refused_by_its_first_word() -> None:
    one = renderer(make.tokenizer(["<unk>", "</s>"], ["sky", "why"]), template=RAW)
    with pytest.raises(RowError, match="tokenizer changes the response: 'green'"):
        render(one, prompt="why", response="sky green")
    with pytest.raises(RowError, match="tokenizer changes the user message: 'who'"):
        render(one, prompt="who", response="sky")


def test_a_text_that_the_tokenizer_writes_in_lower_case_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = make.byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    with pytest.raises(RowError, match="tokenizer changes the response: 'Paris'"):
        render(renderer(tokenizer, template=RAW), prompt="where", response="in Paris")


def test_equivalent_forms_of_a_letter_are_one_text() -> None:
    from tokenizers import normalizers

    tokenizer = make.byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    render(renderer(tokenizer, template=RAW), prompt="where", response="cafe\u0301")


def test_a_raised_digit_is_not_the_digit() -> None:
    from tokenizers import normalizers

    tokenizer = make.byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    one = renderer(tokenizer, template=RAW)
    render(one, prompt="a", response="\uff21\ufb01ve")  # a wide A, and a ligature
    for text in ("10\u00b2", "\u00bd", "\u2460"):
        with pytest.raises(RowError, match="tokenizer changes the response"):
            render(one, prompt="a", response=text)


def test_no_space_comes_between_prompt_and_response_of_a_tokenizer_that_begins_with_one() -> None:
    pieces = ["\u2581the", "\u2581", "ca", "t", "s", "cat", "cats", "a", "."]
    tokenizer = metaspace_tokenizer(pieces)
    rendered = render(renderer(tokenizer, template=RAW), prompt="the cat", response="s")
    whole = [*rendered.prompt_ids, *rendered.demonstration_response_ids[:-1]]
    assert decode_ids(tokenizer, whole) == "the cats"


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A byte-level or a metaspace tokenizer with merges, and tokens that take the space beside."""
    from tokenizers import AddedToken, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    backend = Tokenizer(BPE(unk_token="<unk>"))
    if kind == "bytes":
        backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(  # type: ignore[assignment]
            prepend_scheme=kind, split=False
        )
    alphabet = [*pre_tokenizers.ByteLevel.alphabet(), *"\n\u2581"]
    trainer = BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet
    )
    lines = ["the cat is on the mat\n", "is the cat on it? 12 cats", "<a>the the<b> a cat"]
    backend.train_from_iterator(lines, trainer)
    backend.add_special_tokens(
        [AddedToken("<a>"), AddedToken("<b>", rstrip=True), AddedToken("<c>", lstrip=True)]
    )
    backend.add_tokens([AddedToken("<b>the"), AddedToken("<d>", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


PARTS = [
    "the",
    "cat",
    " cat",
    " ",
    "  ",
    "\n",
    "1",
    "2",
    "is",
    "s",
    "<a>",
    "<b>",
    "<c>",
    "<d>",
    "<",
]


@given(
    kind=st.sampled_from(["bytes", "first", "always"]),
    before=st.lists(st.sampled_from(PARTS), min_size=1, max_size=8).map("".join),
    after=st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map("".join),
)
def test_a_response_has_the_ids_that_it_has_after_the_whole_prompt(
    kind: str, before: str, after: str
) -> None:
    one = CONTINUING[kind]
    ids, whole = one._encode(before), one._encode(before + after)
    if whole[: len(ids)] == ids:  # else the response is tokenized without its prompt
        assert one._continue(before, ids, after) == whole[len(ids) :]


CONTINUING = {
    kind: renderer(trained_tokenizer(kind), template=RAW) for kind in ("bytes", "first", "always")
}


# ---- what a model said ---------------------------------------------------------------------------


def test_a_response_keeps_its_space_and_its_control_tokens() -> None:
    tokenizer = make.byte_tokenizer()
    ids = [*tokenizer(" so <|im_start|>")["input_ids"], 256]
    said = make.rollout(prompt=tokenizer("why")["input_ids"], response=ids)
    assert spoken(tokenizer, said) == " so <|im_start|>"


def test_the_first_space_is_kept_where_the_tokenizer_drops_it() -> None:
    tokenizer = metaspace_tokenizer(["\u2581is", "\u2581so", "\u2581", "a"])
    said = make.rollout(
        prompt=tokenizer("is")["input_ids"], response=[*tokenizer("so")["input_ids"], 1]
    )
    assert spoken(tokenizer, said) == " so"


# ---- two templates -------------------------------------------------------------------------------


def test_a_teacher_with_another_template_is_shown_with_both_texts() -> None:
    ours = make.byte_tokenizer(chat_template=CHATML)
    theirs = make.byte_tokenizer(chat_template=CHATML.replace("assistant\n{%", "assistant\n\n{%"))
    config = DataConfig(train=(Path("a.jsonl"),))
    prompt = make.prompt("q1", text="why")
    assert template_difference(prompt, config, ours, ours, name="the teacher") == ""
    warning = template_difference(prompt, config, ours, theirs, name="the teacher")
    assert "q1" in warning
    assert repr("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n") in warning
    bare = make.byte_tokenizer()
    assert "has no chat template" in template_difference(prompt, config, ours, bare, name="x")


def test_a_renderer_knows_whether_its_prompts_change_with_the_day() -> None:
    dated = CHATML.replace("{% for", "{{ strftime_now('%d %B %Y') }}{% for", 1)
    day = datetime(2026, 11, 25)
    tokenizer = make.byte_tokenizer(chat_template=dated)
    assert renderer(tokenizer, time=day).writes_date
    assert not with_template(CHATML).writes_date
    assert not renderer(tokenizer, template=RAW).writes_date
