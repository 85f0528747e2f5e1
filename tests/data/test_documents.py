import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metajax.core.errors import UserError
from metajax.data.documents import BadRecord, is_validation


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_keeps_every_validation_origin(origin, a, b):
    small, large = sorted((a, b))
    assert not is_validation(origin, small) or is_validation(origin, large)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_share_of_one_is_all_validation_and_of_zero_none(origin):
    assert is_validation(origin, 1.0)
    assert not is_validation(origin, 0.0)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_about_the_stated_share_of_origins_is_validation(share):
    n = 20_000
    held = sum(is_validation(f"module.{i}", share) for i in range(n))
    assert abs(held / n - share) < 5 * (share * (1 - share) / n) ** 0.5


def test_the_rule_is_sha1_modulo_ten_thousand():
    for i in range(200):
        remainder = int.from_bytes(hashlib.sha1(f"site{i}".encode()).digest(), "big") % 10_000
        assert is_validation(f"site{i}", (remainder + 1) / 10_000)
        assert not is_validation(f"site{i}", remainder / 10_000)


def test_a_bad_record_is_a_user_error():
    assert issubclass(BadRecord, UserError)
