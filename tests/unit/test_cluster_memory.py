"""What a cluster remembers: the versions it served, whose turn it is, and how much of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import SafetyError
from ml.version import Version
from tasks.cluster.memory import REMEMBERED, Kept, Memory, Served

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
V1, V2, V3 = (Version(1, minor, 0) for minor in range(3))


def served(*versions: Version) -> Memory:
    """A memory of these versions, the oldest first."""
    memory = Memory()
    for version in versions:
        memory = memory.with_served(Served(version=str(version), at=NOW, by="asha", reason="promoted"))
    return memory


@given(st.lists(st.sampled_from([V1, V2, V3]), max_size=60))
def test_the_newest_versions_are_remembered_in_order_and_never_too_many(versions: list[Version]) -> None:
    told = [entry.version for entry in served(*versions).served]
    changes = [str(v) for v, before in zip(versions, [None, *versions], strict=False) if v != before]
    assert told == changes[::-1][:REMEMBERED]


def test_the_version_before_is_another_one_than_the_current() -> None:
    assert served(V1, V2).before(V2) == V1
    assert served(V1, V2).before(V3) == V2
    assert served(V1, V2, V1).before(V1) == V2
    assert served(V1).before(V1) is None


def test_long_words_are_cut() -> None:
    entry = Served(version="v1.0.0", at=NOW, by="asha", reason="why " * 1000)
    assert len(entry.reason) == 200
    many = Memory(served=(entry,) * REMEMBERED)
    assert len(many.model_dump_json()) < 10_000


def test_a_turn_is_taken_from_anybody_but_one_who_has_it_alone() -> None:
    ordinary = Memory().taken("release-1", NOW).taken("release-2", NOW)
    assert ordinary.turn is not None
    assert ordinary.turn.owner == "release-2"
    alone = ordinary.taken("rollback-1", NOW, alone_s=60)
    with pytest.raises(SafetyError, match="rollback-1 is rolling the service back"):
        alone.taken("release-3", NOW)
    assert alone.taken("rollback-1", NOW, alone_s=60) == alone
    for free in (
        alone.taken("r", NOW, force=True), alone.taken("r", NOW + timedelta(seconds=61)),
        alone.given_back("rollback-1").taken("r", NOW),
    ):  # fmt: skip
        assert free.turn is not None
        assert free.turn.owner == "r"
    assert alone.given_back("somebody else") == alone


def test_a_version_is_kept_for_its_time_only() -> None:
    memory = Memory(kept=Kept(version="v1.0.0", until=NOW))
    assert memory.is_kept(V1, NOW - timedelta(seconds=1))
    assert not memory.is_kept(V1, NOW)
    assert not memory.is_kept(V2, NOW - timedelta(seconds=1))
    assert not Memory().is_kept(V1, NOW)
