"""What a rollback decides by: the version before, how long it will take, and a registry that is late."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from configs.errors import ExternalError, GateError, IntegrityError
from flows.books import Known, from_cluster, within
from flows.history import merged, spare_row
from flows.rollback import Switch, expected
from ml.version import Version
from tasks.cluster import ClusterStatus, Kept, Memory, Served, Track
from tasks.registry import AliasMove

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
V1, V2, V3 = (Version(1, minor, 0) for minor in range(3))


def entry(version: Version, minute: int = 0, **values: float | bool) -> Served:
    at = NOW + timedelta(minutes=minute)
    return Served(version=str(version), at=at, by="asha", reason="promoted", **values)  # type: ignore[arg-type]


def move(version: Version, minute: int) -> AliasMove:
    at = NOW + timedelta(minutes=minute)
    return AliasMove(
        name="production", seq=minute + 1, moved_from=None, to=version, at=at, by="asha", reason="promoted"
    )


def test_the_version_to_return_to_is_the_one_before_or_one_that_served() -> None:
    known = from_cluster(Memory(served=(entry(V3, 2), entry(V1, 1), entry(V3))))
    assert (known.current, known.previous, known.served) == (V3, V1, (V1, V3))
    assert (known.choose("previous"), known.choose("v1.2.0")) == (V1, V3)
    with pytest.raises(GateError, match=r"v1\.1\.0 never served production \(by what the cluster remembers: v1\.0\.0,"):
        known.choose("v1.1.0")
    with pytest.raises(GateError, match="no previous version"):
        Known(None, None, (), "the registry").choose("previous")


def test_what_the_cluster_remembers_comes_before_what_the_registry_knows_of_the_time_before() -> None:
    moves = [move(V1, 0), move(V2, 1), move(V3, 2)]
    assert [one.version for one in merged((), moves)] == ["v1.2.0", "v1.1.0", "v1.0.0"]
    # The cluster hears of a promotion a moment after the registry: that is one promotion.
    told = merged((entry(V2, 4), entry(V3, 3)), moves)
    assert [(one.version, one.at) for one in told] == [
        (str(version), NOW + timedelta(minutes=minute)) for version, minute in ((V2, 4), (V3, 3), (V2, 1), (V1, 0))
    ]


def test_the_newest_row_of_the_kept_version_says_so_unless_it_serves() -> None:
    status = ClusterStatus({Track.stable: V2, Track.previous: V1}, (), {Track.stable: 1.0}, {}, None)
    kept, entries = Kept(version="v1.0.0", until=NOW), [entry(V2, 2), entry(V1, 1), entry(V2), entry(V1)]
    assert spare_row(entries, kept, status) == 1
    assert spare_row(entries, None, status) is None
    assert spare_row(entries, kept, replace(status, weights={Track.previous: 1.0})) is None
    assert spare_row(entries, kept, replace(status, versions={Track.stable: V2})) is None


def test_a_rollback_is_expected_to_take_as_long_as_the_last_of_its_kind() -> None:
    memory = Memory(served=(entry(V3, took_s=6.6, warm=False), entry(V2, took_s=1.4, warm=True), entry(V1)))
    assert expected(memory, warm=True, most_s=90) == "about 1 s, as the last time"
    assert expected(memory, warm=False, most_s=90) == "about 7 s, as the last time"
    assert expected(Memory(), warm=True, most_s=90) == "within 20 s"
    assert expected(Memory(), warm=False, most_s=90) == "as long as a replica takes to start, at most 90 s"


def test_the_plan_says_which_way_it_goes() -> None:
    cold = Switch(V1, V2, warm=0, replicas=3, expected="about 7 s, as the last time").sentences()
    assert cold[0] == "verify every file of v1.0.0"
    warm = Switch(V1, V2, warm=3, replicas=3, expected="within 20 s").sentences()
    assert warm[0] == "send all traffic to v1.0.0 on 3 replica(s) that were kept warm (within 20 s)"
    assert cold[-1] == warm[-1] == "point production at v1.0.0"


def test_an_answer_that_is_late_is_none_and_an_error_is_handed_on() -> None:
    release = threading.Event()
    with pytest.raises(ExternalError, match=r"no answer within 0\.05 s while reading"):
        within(0.05, "reading", release.wait)
    release.set()
    assert within(5, "reading", lambda: 7) == 7

    def damaged() -> None:
        raise IntegrityError("not an alias")

    with pytest.raises(IntegrityError):
        within(5, "reading", damaged)
