"""What an A/B test may conclude."""

from __future__ import annotations

import pytest

from tasks.cluster import Track
from tasks.cluster.node.routing import Router
from tasks.cluster.sticky import position, track_of
from tasks.rollout.abtest import conclusion, effects, mismatch
from tasks.rollout.anytime import Rate
from tasks.rollout.verdict import Evidence

A = Evidence(requests=4_000, errors=20, slow=40, predictions=3_980, ood=80, classes={"rust": 1_990, "scab": 1_990})
USERS = [f"user-{number}" for number in range(4_000)]


def test_a_version_that_fails_more_is_shown_to_and_its_interval_excludes_zero() -> None:
    found = {e.name: e for e in effects(A, Evidence(requests=4_000, errors=200, slow=40), {}, 0.05)}
    assert found["errors"].shown
    assert 0 < found["errors"].low <= found["errors"].difference <= found["errors"].high
    assert "0.50% of 4,000 with A, 5.00% of 4,000 with B: more with B (+" in found["errors"].sentence
    assert not found["slow answers"].shown


def test_a_version_that_is_the_same_differs_in_nothing() -> None:
    found = effects(A, A, {"feedback": (Rate(9, 90), Rate(9, 90))}, 0.05)
    assert [effect.name for effect in found] == [
        "errors", "slow answers", "no leaf seen", "answer rust", "answer scab", "wrong answers (feedback)",
    ]  # fmt: skip
    assert not any(effect.shown for effect in found)
    [sentence] = conclusion(found, "")
    assert sentence.startswith("no difference between the versions was shown (errors are known within ")


def test_fewer_wrong_answers_by_the_labels_are_an_effect() -> None:
    found = effects(A, A, {"feedback": (Rate(300, 1_000), Rate(100, 1_000))}, 0.05)
    assert conclusion(found, "")[0].startswith(
        "wrong answers (feedback): 30.00% of 1,000 with A, 10.00% of 1,000 with B"
    )


def test_nothing_counted_is_nothing_shown() -> None:
    found = effects(Evidence(), Evidence(), {}, 0.05)
    assert not any(effect.shown for effect in found)
    assert found[0].sentence.endswith("nothing to compare")
    assert mismatch(Evidence(), Evidence(), 0.5) == "no request was counted"


def test_a_split_that_is_not_the_planned_one_is_said_first() -> None:
    assert mismatch(Evidence(requests=5_100), Evidence(requests=4_900), 0.5) == ""
    warning = mismatch(Evidence(requests=6_000), Evidence(requests=4_000), 0.5)
    assert warning.startswith("B got 40.0% of 10,000 requests instead of 50.0%")
    assert conclusion(effects(A, A, {}, 0.05), warning)[0] == warning


def test_users_are_spread_evenly_and_stay_where_they_are_while_the_share_grows() -> None:
    few = {u for u in USERS if track_of(u, "v1.1.0", {Track.stable: 0.75, Track.canary: 0.25}) is Track.canary}
    more = {u for u in USERS if track_of(u, "v1.1.0", {Track.stable: 0.5, Track.canary: 0.5}) is Track.canary}
    assert abs(len(few) - 1_000) < 100
    assert abs(len(more) - 2_000) < 120
    assert few < more


def test_another_version_is_first_met_by_other_users() -> None:
    same = sum((position(u, "v1.1.0") < 0.25) == (position(u, "v1.2.0") < 0.25) for u in USERS) / len(USERS)
    assert same == pytest.approx(0.25**2 + 0.75**2, abs=0.03)


def test_the_gateway_keeps_a_named_user_on_one_track_until_the_lease_is_over() -> None:
    router = Router()
    router.set({Track.stable: 0.5, Track.canary: 0.5}, {}, 10.0, "v1.1.0")
    met = {user: {router.choose(0.0, user) for _ in range(5)} for user in USERS[:50]}
    assert {len(tracks) for tracks in met.values()} == {1}
    assert {track for tracks in met.values() for track in tracks} == {Track.stable, Track.canary}
    assert {router.choose(10.0, user) for user in USERS[:50]} == {Track.stable}
