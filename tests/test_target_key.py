"""Target keys: equal for equal content, different for anything that changes the targets."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from distillm_ray.teacher.target_key import TargetIdentity, target_key
from distillm_ray.types import FinishReason, Rollout, Source
from tests import make

token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12)
TOP_K = TargetIdentity(teacher="a1", kind="top_k", k=64, dtype="bfloat16")
HIDDEN = TargetIdentity(teacher="a1", kind="hidden", dtype="bfloat16")
identities = st.sampled_from([TOP_K, HIDDEN])


@st.composite
def rollouts(draw: st.DrawFn) -> Rollout:
    response = draw(token_ids)
    mask = draw(st.lists(st.booleans(), min_size=len(response), max_size=len(response)))
    return make.rollout(prompt=draw(token_ids), response=response, mask=mask)


@given(identities, rollouts(), st.text(max_size=8), st.integers(0, 9))
def test_what_does_not_change_the_targets_does_not_change_the_key(
    identity: TargetIdentity, rollout: Rollout, text: str, number: int
) -> None:
    other = dataclasses.replace(
        rollout,
        rollout_id=text,
        prompt_id=text,
        source=Source.STUDENT,
        version=number,
        finish_reason=FinishReason.LENGTH,
        logprobs=np.zeros(len(rollout.response_ids), np.float32),
        ordinal=number,
        text=text,
    )
    assert target_key(identity, other) == target_key(identity, rollout)


@given(rollouts())
def test_a_view_of_the_tokens_has_the_key_of_a_copy(rollout: Rollout) -> None:
    joined = np.concatenate([rollout.prompt_ids, rollout.response_ids])
    joined.flags.writeable = False
    num_prompt = len(rollout.prompt_ids)
    other = dataclasses.replace(
        rollout, prompt_ids=joined[:num_prompt], response_ids=joined[num_prompt:]
    )
    assert target_key(HIDDEN, other) == target_key(HIDDEN, rollout)


@given(
    rollouts(),
    st.sampled_from(
        [
            dataclasses.replace(TOP_K, teacher="a2"),
            dataclasses.replace(TOP_K, dtype="float32"),
            dataclasses.replace(TOP_K, k=63),
            HIDDEN,
            dataclasses.replace(HIDDEN, kind="logits"),
        ]
    ),
)
def test_another_teacher_dtype_kind_or_k_gives_another_key(
    rollout: Rollout, other: TargetIdentity
) -> None:
    assert target_key(other, rollout) != target_key(TOP_K, rollout)


@given(identities, rollouts(), st.data())
def test_a_single_token_or_mask_bit_gives_another_key(
    identity: TargetIdentity, rollout: Rollout, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["prompt_ids", "response_ids", "loss_mask"]))
    values = getattr(rollout, name).copy()
    index = data.draw(st.integers(0, len(values) - 1))
    values[index] = not values[index] if values.dtype == bool else values[index] ^ 1
    other = dataclasses.replace(rollout, **{name: values})
    assert target_key(identity, other) != target_key(identity, rollout)


@given(st.lists(st.integers(0, 9), min_size=3, max_size=12), st.data())
def test_the_boundary_between_prompt_and_response_is_part_of_the_key(
    tokens: list[int], data: st.DataObject
) -> None:
    cuts = st.integers(1, len(tokens) - 1)
    one, two = data.draw(cuts), data.draw(cuts)
    assume(one != two)
    keys = {
        target_key(HIDDEN, make.rollout(prompt=tokens[:cut], response=tokens[cut:]))
        for cut in (one, two)
    }
    assert len(keys) == 2


def test_fields_cannot_run_into_each_other() -> None:
    rollout = make.rollout(prompt=[1], response=[2])
    one = TargetIdentity(teacher="ahidden", kind="hidden", dtype="float32")
    two = TargetIdentity(teacher="a", kind="hidden", dtype="float32")
    assert target_key(one, rollout) != target_key(two, rollout)


def test_a_key_is_a_digest_of_length_prefixed_little_endian_fields() -> None:
    parts = [
        b"a1",
        b"hidden",
        b"None",
        b"bfloat16",
        struct.pack("<2i", 1, 2),
        struct.pack("<3i", 3, 4, 5),
        bytes([1, 0, 1]),
    ]
    content = b"".join(struct.pack("<Q", len(part)) + part for part in parts)
    expected = hashlib.blake2b(content, digest_size=16).hexdigest()
    rollout = make.rollout(prompt=[1, 2], response=[3, 4, 5], mask=[True, False, True])
    assert target_key(HIDDEN, rollout) == expected


def test_k_belongs_to_top_k_only() -> None:
    with pytest.raises(AssertionError, match="k = 64 for hidden"):
        TargetIdentity(teacher="a", kind="hidden", k=64, dtype="float32")
    with pytest.raises(AssertionError, match="k = None for top_k"):
        TargetIdentity(teacher="a", kind="top_k", dtype="float32")
