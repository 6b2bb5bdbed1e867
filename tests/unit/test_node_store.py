"""The node's state folder: atomic, twice, bounded, owned by one process."""

from __future__ import annotations

import json
import os

import pytest

from configs.errors import ConfigError, ExternalError, IntegrityError
from tasks.cluster import Track
from tasks.cluster.node import policy, store
from tasks.cluster.node.state import Desired, Event, ReplicaRecord, utcnow
from tasks.cluster.node.store import Store


@pytest.fixture
def kept(tmp_path) -> Store:
    return Store(tmp_path / "node")


def _canaried() -> Desired:
    both = policy.deploy(policy.deploy(Desired(), Track.stable, "v1.0.0", 2), Track.canary, "v1.1.0", 1)
    return policy.set_weights(both, {Track.stable: 0.5, Track.canary: 0.5}, {Track.canary: 1.0}, utcnow())


def test_a_new_folder_holds_nothing(kept):
    assert kept.load_desired() == (Desired(), None)


def test_what_was_saved_is_loaded(kept):
    kept.save_desired(_canaried())
    assert kept.load_desired()[1] is None
    assert kept.load_desired()[0].weights == {Track.stable: 0.5, Track.canary: 0.5}


@pytest.mark.parametrize("damage", ["", '{"format": 1, "tra', '{"format": 2}', "\0" * 64], ids=repr)
def test_a_damaged_state_is_read_from_its_copy_with_all_traffic_on_stable(kept, damage):
    kept.save_desired(_canaried())
    (kept.root / "desired.json").write_text(damage)
    desired, why = kept.load_desired()
    assert desired.tracks == _canaried().tracks
    assert (desired.weights, desired.mirror, desired.lease_expires_at) == ({Track.stable: 1.0}, {}, None)
    assert "desired.json" in str(why)
    assert (kept.root / "desired.json.damaged").read_text() == damage


def test_a_lost_state_is_read_from_its_copy(kept):
    kept.save_desired(_canaried())
    (kept.root / "desired.json").unlink()
    assert kept.load_desired()[0].tracks == _canaried().tracks


def test_a_state_and_a_copy_that_are_both_damaged_are_refused_by_name(kept):
    kept.save_desired(_canaried())
    for name in ("desired.json", "desired.json.bak"):
        (kept.root / name).write_text("{")
    with pytest.raises(IntegrityError, match=r"desired\.json cannot be read.*desired\.json\.bak"):
        kept.load_desired()


def test_a_disk_that_takes_nothing_is_an_external_error_and_the_old_state_stands(kept):
    kept.save_desired(_canaried())
    (kept.root / "desired.json.bak.partial").mkdir()
    with pytest.raises(ExternalError, match="earlier state stands"):
        kept.save_desired(Desired())
    assert kept.load_desired()[0].tracks == _canaried().tracks


def test_a_second_node_on_the_same_folder_is_refused(kept):
    with kept.locked(), pytest.raises(ConfigError, match="another node"), Store(kept.root).locked():
        raise AssertionError("two nodes hold one folder")
    with kept.locked():
        assert (kept.root / "node.lock").exists()


def test_a_damaged_replica_record_does_not_hide_the_others(kept):
    record = ReplicaRecord(
        name="stable-v1.0.0-a", track=Track.stable, version="v1.0.0", generation=0, port=20_000, started_at=utcnow()
    )
    kept.save_replica(record)
    (kept.replicas / "torn.json").write_text("{")
    good, bad = kept.load_replicas()
    assert good == [record]
    assert [path.name for path in bad] == ["torn.json"]


def test_long_logs_are_cut_in_place_and_the_tail_is_kept(kept, monkeypatch):
    monkeypatch.setattr(store, "MAX_LOG_BYTES", 1_000)
    with kept.log_path("a").open("ab") as writer:
        writer.write(b"line\n" * 400)
        writer.flush()
        kept.bound_logs()
        assert kept.log_path("a").stat().st_size == 0
        assert len((kept.logs / "a.log.1").read_bytes()) == 250
        writer.write(b"after\n")
        writer.flush()
    assert kept.log_tail("a", 5) == ["after"]


def test_logs_of_replicas_long_gone_are_removed_oldest_first(kept):
    for index in range(5):
        path = kept.log_path(f"gone-{index}")
        path.write_text("x")
        moment = 1_000_000 + index
        os.utime(path, (moment, moment))
    kept.prune_logs(keep=2)
    assert sorted(path.stem for path in kept.logs.glob("*.log")) == ["gone-3", "gone-4"]


def test_events_outlive_the_process_and_a_torn_line(kept):
    for index in range(3):
        kept.append_event(Event(at=utcnow(), kind="deploy", subject=str(index), detail=""))
    with (kept.root / "events.jsonl").open("a") as file:
        file.write('{"at": "2026')
    assert [event.subject for event in Store(kept.root).load_events()] == ["0", "1", "2"]


def test_the_event_file_is_bounded(kept, monkeypatch):
    monkeypatch.setattr(store, "MAX_EVENTS_BYTES", 2_000)
    for index in range(100):
        kept.append_event(Event(at=utcnow(), kind="deploy", subject=str(index), detail="x" * 50))
    lines = (kept.root / "events.jsonl").read_text().splitlines()
    assert (kept.root / "events.jsonl").stat().st_size < 3_000
    assert json.loads(lines[-1])["subject"] == "99"
