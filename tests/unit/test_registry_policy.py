"""Which version comes next, and what an alias's move needs."""

from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from ml.version import Version
from tasks.registry.policy import displaced, needs_move, next_version
from tasks.registry.records import AliasMove

versions = st.builds(Version, *[st.integers(0, 50)] * 3)
V1, V2 = Version(1, 0, 0), Version(2, 0, 0)


def move_to(version: Version | None) -> AliasMove:
    at = datetime(2026, 5, 4, tzinfo=UTC)
    return AliasMove(name="production", seq=3, moved_from=None, to=version, at=at, by="asha", reason="better")


def test_the_first_version_is_1_0_0() -> None:
    assert next_version([], "patch") == V1


def test_the_next_version_follows_the_highest_not_the_latest() -> None:
    taken = [Version(1, 2, 0), Version(1, 10, 0), Version(1, 9, 9)]
    assert str(next_version(taken, "minor")) == "v1.11.0"
    assert str(next_version(taken, "patch")) == "v1.10.1"
    assert str(next_version(taken, "major")) == "v2.0.0"


@settings(deadline=None)
@given(st.sets(versions, min_size=1), st.sampled_from(["major", "minor", "patch"]))
def test_the_next_version_is_higher_than_all(taken: set[Version], bump: str) -> None:
    assert next_version(taken, bump) > max(taken)  # type: ignore[arg-type]


def test_an_alias_moves_only_when_it_points_elsewhere() -> None:
    assert needs_move(None, V1)
    assert needs_move(move_to(V1), V2)
    assert needs_move(move_to(V1), None)
    assert needs_move(move_to(None), V1)
    assert not needs_move(move_to(V1), V1)
    assert not needs_move(None, None)


def test_only_a_production_that_moves_displaces_a_version() -> None:
    assert displaced("production", V1, V2) == V1
    assert displaced("production", V1, V1) is None
    assert displaced("production", None, V1) is None
    assert displaced("candidate", V1, V2) is None


def test_records_read_back_as_they_were_written() -> None:
    for move in (move_to(V1), move_to(None)):
        assert AliasMove.model_validate_json(move.model_dump_json()) == move
