"""Which pods get traffic, from counts, weights and labels alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.cluster import Track
from tasks.cluster.kubernetes.traffic import PodTraffic, allocate, reachable, shares, switches

STABLE, CANARY, BASELINE, *_ = Track


@pytest.mark.parametrize(
    ("stable", "canary", "weight", "share"),
    [
        (3, 1, 0.25, 0.25),
        (1, 1, 0.5, 0.5),
        (1, 1, 0.05, 0.5),
        (19, 1, 0.05, 0.05),
        (30, 1, 0.25, 1 / 30),
        (4, 4, 1.0, 1.0),
        (3, 0, 0.25, 0.0),
        (0, 2, 0.5, 1.0),
        (2, 2, 0.05, 1 / 3),
    ],
)
def test_the_reachable_share_is_the_nearest_that_whole_pods_make(stable, canary, weight, share):
    assert reachable(stable, canary, weight) == pytest.approx(share)


@given(
    st.fixed_dictionaries({track: st.integers(0, 12) for track in Track}),
    st.fixed_dictionaries({track: st.integers(0, 20) for track in Track}).filter(lambda w: sum(w.values()) > 0),
)
def test_an_allocation_keeps_its_promises(pods, parts):
    weights = {track: part / sum(parts.values()) for track, part in parts.items()}
    chosen = allocate(pods, weights)
    for track in Track:
        served = weights[track] > 0 and pods[track] > 0
        assert (track in chosen) is served
        assert 0 <= chosen.get(track, 0) <= pods[track]
    able = sum(pods[track] for track in Track if weights[track] > 0)
    assert sum(chosen.values()) >= min(pods[STABLE], able)


def test_more_pods_never_make_the_share_worse():
    far = [abs(reachable(n, n, 0.3) - 0.3) for n in range(1, 30)]
    assert far == pytest.approx(sorted(far, reverse=True), abs=0.02)


def test_shares_of_nothing_are_nothing():
    assert shares({STABLE: 0, CANARY: 0}) == {}


def _pods(track: Track, *on: bool, ready: bool = True) -> list[PodTraffic]:
    return [PodTraffic(f"{track}-{n}", track, ready, is_on, age=str(n)) for n, is_on in enumerate(on)]


def test_traffic_is_turned_on_before_it_is_turned_off():
    pods = [*_pods(STABLE, True, True), *_pods(CANARY, False, False)]
    assert switches(pods, {CANARY: 1.0}) == [
        ("canary-0", True),
        ("canary-1", True),
        ("stable-0", False),
        ("stable-1", False),
    ]


def test_pods_that_have_what_they_should_are_left_alone():
    pods = [*_pods(STABLE, True, True, True), *_pods(CANARY, True)]
    assert switches(pods, {STABLE: 0.75, CANARY: 0.25}) == []
    assert switches(pods, {STABLE: 1.0}) == [("canary-0", False)]


def test_pods_that_have_traffic_keep_it_where_not_all_should():
    pods = [*_pods(STABLE, False, True, True), *_pods(CANARY, False, True)]
    assert switches(pods, {STABLE: 0.5, CANARY: 0.5}) == [("canary-0", True)]


def test_a_guest_that_is_not_ready_has_no_traffic_and_stable_keeps_it():
    pods = [*_pods(STABLE, True, ready=False), *_pods(CANARY, True, ready=False)]
    assert switches(pods, {STABLE: 0.5, CANARY: 0.5}) == [("canary-0", False)]


def test_nobody_is_served_without_weights():
    assert switches(_pods(STABLE, True, True), {}) == [("stable-0", False), ("stable-1", False)]


def test_a_pod_of_stable_that_lost_its_traffic_gets_it_back():
    assert switches(_pods(STABLE, True, False), {STABLE: 1.0}) == [("stable-1", True)]
