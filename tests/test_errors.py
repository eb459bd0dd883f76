# SPDX-License-Identifier: Apache-2.0
"""What errors say."""

from __future__ import annotations

import pytest

from offsite_ray.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no\nmore"), "no"),
        (ValueError("\n no \n"), "no"),
        (AssertionError(), "AssertionError"),
        (RuntimeError(" "), "RuntimeError"),
    ],
)
def test_an_error_of_a_library_is_one_line(error: Exception, said: str) -> None:
    assert first_line(error) == said
