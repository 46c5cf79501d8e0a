"""Digests tell apart what differs, and agree on what does not (in any process: see test_models)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clip_dissect_cvn.digests import digest_of, digest_of_file, digest_of_state
from clip_dissect_cvn.errors import ArgumentError


@dataclass(frozen=True)
class Pair:
    a: int
    b: torch.Tensor


DIFFERENT = [
    None, True, False, 0, 1, 1.0, "1", "", b"", b"1", [], [1], [[1]], {}, {"1": 1}, {1: 1}, {"a": [1]}, {1},
    Path("1"), np.ones(1), np.ones((1, 1)), np.ones(1, np.float32), np.float32(1), torch.ones(1),
    torch.ones(1, 1), torch.ones(1, dtype=torch.bfloat16), torch.ones(()), torch.zeros(0, 2),
    Pair(1, torch.ones(1)), Pair(1, torch.zeros(1)),
]  # fmt: skip


def test_tells_all_these_apart() -> None:
    digests = [digest_of(value) for value in DIFFERENT]
    assert len(set(digests)) == len(DIFFERENT)
    assert all(len(digest) == 32 and int(digest, 16) >= 0 for digest in digests)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), plain))
def test_does_not_depend_on_the_order_of_keys(parts: dict[str, object]) -> None:
    assert digest_of(parts) == digest_of(dict(reversed(parts.items())))


@settings(max_examples=40, deadline=None)
@given(plain, plain)
def test_equal_only_for_what_is_equal(one: object, other: object) -> None:
    assert (digest_of(one) == digest_of(other)) == (repr(sorted_keys(one)) == repr(sorted_keys(other)))


def sorted_keys(value: object) -> object:
    if isinstance(value, dict):
        return {key: sorted_keys(value[key]) for key in sorted(value)}
    return [sorted_keys(held) for held in value] if isinstance(value, list) else value


def test_a_strided_tensor_equals_its_copy() -> None:
    tensor = torch.arange(6.0).reshape(2, 3).T
    assert digest_of(tensor) == digest_of(tensor.contiguous())
    assert digest_of(np.arange(6)[::2]) == digest_of(np.arange(6)[::2].copy())


def test_refuses_what_has_no_stable_digest() -> None:
    with pytest.raises(ArgumentError, match=r"A builtins\.object .* has no stable digest\. Pass plain data"):
        digest_of({"a": object()})


def test_a_module_by_its_weights_and_every_buffer() -> None:
    module = nn.BatchNorm1d(2)
    digests = {digest_of_state(module)}
    module.weight.data[0] = 2.0
    digests.add(digest_of_state(module))
    module.running_mean[0] = 1.0  # type: ignore[index]
    digests.add(digest_of_state(module))
    module.register_buffer("hidden", torch.ones(1), persistent=False)
    digests.add(digest_of_state(module))
    assert len(digests) == 4
    assert digest_of_state(nn.Linear(2, 1)) != digest_of_state(nn.Linear(2, 1))


def test_a_file_by_its_content(tmp_path: Path) -> None:
    for name, content in (("a", b"x"), ("b", b"x"), ("c", b"y")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (digest_of_file(tmp_path / name) for name in "abc")
    assert a == b != c
