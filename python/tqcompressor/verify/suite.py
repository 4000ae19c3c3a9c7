"""The checks as tests, one for each: `pytest --pyargs tqcompressor.verify --tq-model DIR`. The plugin collects them."""

from collections.abc import Callable

import pytest

from .checks import CHECKS, Verification


@pytest.mark.parametrize("check", CHECKS)
def test_checkpoint(check: str, tq_verification: Verification, record_property: Callable[[str, object], None]) -> None:
    """What a check claims holds; the figures are properties in the JUnit file."""
    result = tq_verification.result(CHECKS[check])
    for name, figure in result.figures.items():
        record_property(name, figure)
    record_property("detail", result.detail)
    if result.status == "skipped":
        pytest.skip(result.detail)
    if result.status != "passed":
        pytest.fail(f"expected that {result.claim}: {result.detail}", pytrace=False)
