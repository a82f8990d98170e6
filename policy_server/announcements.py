"""What requests say of episodes besides their steps: how they start, and the application's numbers.

Loop thread only. Rows and uploads bring the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from client_sdk.wire import MAX_METRIC_NAME, MAX_METRICS
from client_sdk.wire import policyserver_pb2 as pb
from client_sdk.wire.faults import Fault, Reason
from policy_server.tracks import EpisodeOptions

_MAX_LABEL = 256
"""Characters of an episode's label that are kept."""


def starts_of(starts: Sequence[pb.EpisodeStart], limit: int) -> dict[int, EpisodeOptions]:
    """What a request says of episodes to come, by their number.

    Args:
        starts: Of the request.
        limit: On open episodes of one session.

    Raises:
        Fault: LIMIT_EXCEEDED; there are more.
    """
    if len(starts) > limit:
        raise Fault(
            Reason.LIMIT_EXCEEDED,
            f"expected at most max_open_episodes_per_session={limit} starts, got "
            f"{len(starts)}; end some episodes first, or raise that setting on the server",
            "starts",
        )
    return {
        start.episode: EpisodeOptions(
            label=start.label[:_MAX_LABEL],
            evaluation=start.evaluation,
            greedy=start.greedy,
            resumed=start.resumed,
        )
        for start in starts
    }


def check_metrics(all_metrics: Sequence[pb.EpisodeMetrics]) -> None:
    """Refuse numbers that RLlib's metrics would not take.

    Raises:
        Fault: LIMIT_EXCEEDED or NOT_FINITE.
    """
    for index, metrics in enumerate(all_metrics):
        if len(metrics.values) > MAX_METRICS:
            raise Fault(
                Reason.LIMIT_EXCEEDED,
                f"expected at most {MAX_METRICS} names in one episode, got {len(metrics.values)}; "
                "report fewer",
                f"metrics[{index}].values",
            )
        for name, value in metrics.values.items():
            if len(name) > MAX_METRIC_NAME:
                raise Fault(
                    Reason.LIMIT_EXCEEDED,
                    f"expected names of at most {MAX_METRIC_NAME} characters, got one of "
                    f"{len(name)} that begins with {name[:32]!r}",
                    f"metrics[{index}].values",
                )
            if not math.isfinite(value):
                raise Fault(
                    Reason.NOT_FINITE,
                    f"expected a finite number, got {value}",
                    f"metrics[{index}].values[{name!r}]",
                )
