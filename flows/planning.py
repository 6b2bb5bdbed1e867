"""What a rollout can see, from the settings and the traffic there is: for `khet canary plan` and before a release."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from configs.errors import ExternalError
from configs.settings import Settings
from flows.systems import Systems
from tasks.cluster import Cluster, Track, TrackCounters
from tasks.rollout.planner import warnings
from tasks.rollout.procedure import Plan
from tasks.rollout.supply import Setup, Traffic

MEASURE_S = 3.0
# A release is not held up for longer; this tells ten requests a second from a hundred.
_BEFORE_RELEASE_S = 1.0


def rollout_warnings(
    settings: Settings, cluster: Cluster, plan: Plan, *, seconds: float = _BEFORE_RELEASE_S
) -> list[str]:
    """What a person should know before this rollout starts; empty when every stated harm would be seen in time.

    Looks at the gateway for `seconds`, to know its traffic.

    Raises:
        ExternalError: the cluster does not answer.
    """
    if plan.champion is None:
        return []
    traffic = expected_traffic(settings, measured_rate(cluster, seconds))
    if traffic is None:
        return ["no requests arrive and none are replayed (replay.enabled): the rollout cannot decide anything"]
    return warnings(
        Setup(settings.canary, settings.judge, settings.harms, traffic, classes=plan.classes, baseline=plan.baseline)
    )


def foreseen(connected: Systems, plan: Plan) -> list[str]:
    """`rollout_warnings` where a forecast must not be what stops somebody."""
    try:
        return rollout_warnings(connected.settings, connected.cluster, plan)
    except ExternalError as error:
        return [f"what this rollout can see is not known: {error}"]


def expected_traffic(settings: Settings, users_per_s: float) -> Traffic | None:
    """Users' requests and the replayer's during a rollout; None where there are neither."""
    replay = settings.replay
    labelled = replay.rate_per_s if replay.enabled else 0.0
    if users_per_s + labelled <= 0:
        return None
    return Traffic(users_per_s + labelled, labelled, replay.max_images if replay.enabled else 0)


def measured_rate(
    cluster: Cluster,
    seconds: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> float:
    """Requests a second that the gateway sends to all tracks, measured for `seconds`.

    Raises:
        ExternalError: the cluster does not answer.
    """
    before, began = cluster.counters(), clock()
    sleep(seconds)
    now = cluster.counters()
    return sum(_added(before, now, track) for track in now) / (clock() - began)


def _added(before: Mapping[Track, TrackCounters], now: Mapping[Track, TrackCounters], track: Track) -> int:
    """A track that began to count anew in between counts in full."""
    same = track in before and before[track].since == now[track].since
    return now[track].requests - (before[track].requests if same else 0)
