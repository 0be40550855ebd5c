"""What the fuzz tests share: how many examples, what is awkward, and what counts as an answer.

The examples are the same every time. For a campaign with new ones: `CARTWRIGHT_FUZZ_EXAMPLES=20000 pytest tests/test_fuzz*.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tasks.domain.errors import UserError

MORE = os.environ.get("CARTWRIGHT_FUZZ_EXAMPLES")
settings.register_profile(
    "fuzz", derandomize=not MORE, max_examples=int(MORE or 40), deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("fuzz")
DEEP = 100_000

AWKWARD = [
    b"&a ", b"*a", b"<<: *a", b"!!binary x", b"!!python/object:os.system ", b"2001-99-99", b"0b", b"9" * 5000, b"? [a]\n: b\n", b"\x00", b"\xff",
    b"\x85", b"\r", b"\t", b"[" * 2000, b"(" * 2000, b"{", b"}", b"{}", b"[]", b"|", b"\n", b": ", b"- ", b"'", b'"', b"null", b"true", b"-1", b"''",
    b"../../x", b"path: /\n", b"1: 2\n", b".nan", b"\\ud800", b"\\u0000", b"," * 9, b"a" * 3000, b"\xef\xbb\xbf", b"{x.y}", b"@", b"=",
]  # fmt: skip


def mutated(*wholes: bytes) -> st.SearchStrategy[bytes]:
    """One of some right files, in which up to four pieces are replaced; or any bytes at all."""

    def mutate(whole: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
        for at, length, new in changes:
            start = at % (len(whole) + 1)
            whole = whole[:start] + new + whole[start + length :]
        return whole

    piece = st.sampled_from(AWKWARD) | st.binary(max_size=12)
    change = st.tuples(st.integers(0, 100_000), st.integers(0, 30), piece)
    return st.builds(mutate, st.sampled_from(wholes), st.lists(change, max_size=4)) | st.binary(max_size=300)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["\ud800", "9" * 500, "intent", "product"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "gold", "intent", "product", "quantity", "score", "items", "pattern"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


def answered(call: Callable[[], Any]) -> Any:
    """What a call gives, or the one clear error it raises instead; any other exception fails the test."""
    try:
        return call()
    except UserError as error:
        assert len(str(error)) < 3000
        return error
