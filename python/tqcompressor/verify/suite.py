"""The checks as tests, one for each: `pytest --pyargs tqcompressor.verify --tq-model DIR`. The plugin collects them."""

import pytest

from .checks import CHECKS, Verification


@pytest.mark.parametrize("check", CHECKS)
def test_checkpoint(check: str, tq_verification: Verification, request: pytest.FixtureRequest) -> None:
    """What a check claims holds; the figures are properties in the JUnit file."""
    result = tq_verification.result(CHECKS[check])
    # Not `record_property`, which warns with the default kind of JUnit file.
    request.node.user_properties += [*result.figures.items(), ("detail", result.detail)]
    if result.status == "skipped":
        pytest.skip(result.detail)
    if result.status != "passed":
        pytest.fail(f"expected that {result.claim}: {result.detail}", pytrace=False)
