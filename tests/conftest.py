"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator

import pytest


def pytest_configure() -> None:
    """What a script starts in the background ignores Ctrl-C, and so does whatever it starts.

    What ``nohup`` starts ignores that its terminal is closed, likewise.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    # Ray, here and in the commands that tests start, starts workers that somebody wants only.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


SHARED = ("ray_session", "packages")
"""Fixtures that take long: in one process they are made once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a fixture stays together: last in one process, in one of them where there are more."""
    for item in items:
        for shared in set(SHARED) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(shared))
    # Also an idle Ray takes its share of the processors.
    items.sort(key=lambda item: "ray_session" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What tests of ill-formed text leave in the log has to become UTF-8 to cross processes."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for the whole run: starting it takes seconds."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
