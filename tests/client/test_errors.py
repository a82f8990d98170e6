"""The exceptions of the client: one class per reason, one tree, and all of it travels."""

import copy
import pickle

import pytest

from client_sdk import errors
from client_sdk.errors import (
    ERROR_OF_REASON,
    BatchError,
    NotFiniteError,
    PolicyClientError,
    ServiceError,
    UsageError,
    error_from_fault,
)
from client_sdk.wire.faults import Fault, Reason


def tree(base: type[PolicyClientError]) -> list[type[PolicyClientError]]:
    return [base, *(each for child in base.__subclasses__() for each in tree(child))]


CLASSES = [each for each in tree(PolicyClientError) if each.__module__ == errors.__name__]


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_has_a_class(reason):
    error = error_from_fault(Fault(reason, "expected this, got that", "rows[3]", 1.5))
    assert error.reason is reason
    assert str(error) == "rows[3]: expected this, got that"
    assert error.retry_after_s == 1.5


def test_no_two_reasons_share_a_class():
    assert len(set(ERROR_OF_REASON.values())) == len(Reason)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_exception_survives_pickling_and_copying(error):
    original = (
        BatchError({3: NotFiniteError("got nan", "observations")}, actions=[1, 0])
        if error is BatchError
        else error("what and why", "rows[1]", 2.0)
    )
    for twin in (pickle.loads(pickle.dumps(original)), copy.copy(original)):
        assert type(twin) is error
        assert str(twin) == str(original)
        assert twin.field == original.field
        assert twin.retry_after_s == original.retry_after_s
        if isinstance(original, BatchError):
            assert twin.actions == [1, 0]
            assert str(twin.rows[3]) == "observations: got nan"


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_an_exception_is_the_callers_bug_or_the_worlds_fault_and_never_both(error):
    if error in {PolicyClientError, BatchError}:
        return
    assert issubclass(error, UsageError) != issubclass(error, ServiceError)


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_every_exception_is_drawn_in_the_tree(error):
    assert error.__name__ in (errors.__doc__ or "")


def test_common_faults_are_also_what_python_calls_them():
    assert issubclass(errors.InvalidValueError, ValueError)
    assert issubclass(errors.ConnectError, ConnectionError)
    assert issubclass(errors.PolicyTimeout, TimeoutError)


def test_a_batch_error_names_its_rows():
    rows = {row: NotFiniteError("expected a finite number, got nan") for row in (7, 2, 9)}
    assert str(BatchError(rows)) == (
        "row 2: expected a finite number, got nan (and 2 more: rows 7, 9)"
    )
