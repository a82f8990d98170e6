"""Faults: the enum of the contract, their status, and the two ways they travel."""

from __future__ import annotations

import pickle

import grpc
import pytest

from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import STATUS_OF_REASON, Fault, Reason


def test_reasons_are_those_of_the_contract() -> None:
    contract = {
        name.removeprefix("ERROR_REASON_"): number for name, number in pb.ErrorReason.items()
    }
    assert {reason.name: reason.value for reason in Reason} == contract


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_status_that_is_a_failure(reason: Reason) -> None:
    assert Fault(reason, "message").status is STATUS_OF_REASON[reason]
    assert STATUS_OF_REASON[reason] is not grpc.StatusCode.OK


def test_no_status_is_kept_for_a_reason_that_is_gone() -> None:
    assert set(STATUS_OF_REASON) == set(Reason)


@pytest.mark.parametrize("reason", Reason)
def test_every_fault_survives_pickling(reason: Reason) -> None:
    fault = Fault(reason, "expected this, got that", 'observation["camera"]', 2.5)
    copy = pickle.loads(pickle.dumps(fault))
    assert type(copy) is Fault
    assert copy.args == fault.args
    assert str(copy) == str(fault)


@pytest.mark.parametrize("retry_after_s", [None, 0.0, 0.25, 3600.0])
@pytest.mark.parametrize("reason", Reason)
def test_every_fault_survives_the_wire(reason: Reason, retry_after_s: float | None) -> None:
    fault = Fault(reason, "expected this, got that", "groups[0].rewards", retry_after_s)
    detail = pb.ErrorDetail.FromString(fault.to_detail().SerializeToString())
    assert Fault.from_detail(detail).args == fault.args


@pytest.mark.parametrize("reason", Reason)
def test_a_detail_tells_the_status_that_a_failed_call_would_have(reason: Reason) -> None:
    fault = Fault(reason, "message")
    assert fault.to_detail().status_code == fault.status.value[0]


def test_a_reason_of_a_newer_peer_becomes_unspecified() -> None:
    detail = pb.ErrorDetail(message="something new")
    detail.MergeFromString(b"\x08\xe7\x07")  # reason = 999
    fault = Fault.from_detail(detail)
    assert fault.reason is Reason.UNSPECIFIED
    assert fault.message == "something new"


def test_the_field_comes_before_the_message() -> None:
    assert str(Fault(Reason.NOT_FINITE, "got nan", "reward")) == "reward: got nan"
    assert str(Fault(Reason.NOT_FINITE, "got nan")) == "got nan"
