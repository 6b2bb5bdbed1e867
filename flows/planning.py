"""What a rollout can see, from the settings and the traffic there is: for `khet canary plan` and before a release."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from configs.errors import ExternalError
from configs.settings import Settings
from flows.systems import Systems
from ml.version import Version
from tasks.cluster import Cluster, Track, TrackCounters
from tasks.cluster.procedures import procedures
from tasks.rollout.journal import ReleaseRecord
from tasks.rollout.planner import warnings
from tasks.rollout.procedure import Plan
from tasks.rollout.supply import Setup, Traffic

MEASURE_S = 3.0
# A release is not held up for longer; this tells ten requests a second from a hundred.
_BEFORE_RELEASE_S = 1.0
_EXACT = 0.005  # of the traffic


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
    coarse = coarse_shares(cluster, plan)
    traffic = expected_traffic(settings, measured_rate(cluster, seconds))
    if traffic is None:
        return [
            *coarse,
            "no requests arrive and none are replayed (replay.enabled): the rollout cannot decide anything",
        ]
    setup = Setup(
        settings.canary, settings.judge, settings.harms, traffic, classes=plan.classes, baseline=plan.baseline
    )
    return [*coarse, *warnings(setup)]


def coarse_shares(cluster: Cluster, plan: Plan) -> list[str]:
    """What the steps become where traffic is split by whole replicas; empty where they can be what they say."""
    replicas = {
        Track.stable: plan.replicas,
        Track.canary: plan.canary_replicas,
        Track.baseline: plan.canary_replicas if plan.baseline else 0,
    }
    steps = [step for step in plan.steps if step > 0]
    shares = [cluster.reachable(plan.weights(step), replicas).get(Track.canary, 0.0) for step in steps]
    if all(abs(share - step) < _EXACT for step, share in zip(steps, shares, strict=True)):
        return []
    named = ", ".join(f"{step:.0%} becomes {share:.0%}" for step, share in zip(steps, shares, strict=True))
    return [f"traffic is split by whole replicas here, so for the canary {named}; a gateway would split it exactly"]


def rollout_diff(connected: Systems, record: ReleaseRecord) -> str:
    """What a release changes in the cluster, as `kubectl diff` shows it: the canary that comes and goes, if there is a
    champion to compare it with, and stable in the end."""
    change, area = procedures(connected.cluster), connected.settings.cluster
    version = Version.parse(record.version or "")
    sizes = {Track.canary: area.canary_replicas} if record.champion else {}
    sizes |= {Track.stable: area.replicas}
    parts = (change.deploy(track, version, replicas, dry_run=True) for track, replicas in sizes.items())
    return "\n".join(filter(None, parts))


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
