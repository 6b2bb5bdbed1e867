"""The rollout's steps, with virtual time: what it asks of the cluster, in which order, and what it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from configs.areas import CanarySettings, JudgeSettings
from configs.errors import ExternalError, SafetyError
from ml.version import Version
from tasks.cluster import Track
from tasks.rollout.journal import Journal, ReleaseRecord
from tasks.rollout.keeping import is_over, keep_previous
from tasks.rollout.procedure import Clock, Look, Rollout, plan_rollout, served_version, wants_baseline
from tasks.rollout.verdict import Decision, Verdict
from tests.support.memory_cluster import START, Behaviour, MemoryCluster

OLD, NEW = Version(1, 0, 0), Version(1, 1, 0)


class MemoryBlobs:
    """Two calls of an object store, on a dict."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def put(
        self, bucket: str, key: str, data: bytes, *, if_absent: bool = False, content_type: str | None = None
    ) -> bool:
        if if_absent and key in self.objects:
            return False
        self.objects[key] = data
        return True

    def get(self, bucket: str, key: str) -> bytes:
        return self.objects[key]

    def prefixes(self, bucket: str, prefix: str = "") -> Iterator[str]:
        yield from sorted({key[: key.index("/", len(prefix)) + 1] for key in self.objects if key.startswith(prefix)})

    def exists(self, bucket: str, key: str) -> bool:
        return key in self.objects


class AliasBook:
    """Remembers where aliases were pointed."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, Version]] = []

    def move_alias(self, name: str, version: Version, *, by: str, reason: str) -> None:
        self.moves.append((name, version))


class Case:
    """A cluster that serves OLD and a rollout of NEW."""

    def __init__(
        self,
        behaviour: Behaviour,
        *,
        champion: Version | None = OLD,
        shadow: int = 200,
        baseline: bool = False,
        **canary: Any,
    ) -> None:
        self.cluster = MemoryCluster({NEW: behaviour})
        if champion:
            self.cluster.versions[Track.stable] = champion
            self.cluster.weights = {Track.stable: 1.0}
        record = ReleaseRecord(release_id="r-test", started_at=START, requested_by="t", parameters={})
        self.journal = Journal.start(MemoryBlobs(), "b", record)
        self.looks: list[Look] = []
        self.allowed = True
        settings = CanarySettings(shadow_requests=shadow, **canary)
        plan = plan_rollout(NEW, champion, settings, replicas=2, canary=1, classes=8, baseline=baseline)
        clock = Clock(self.cluster.monotonic, self.cluster.sleep, self.cluster.now)
        self.rollout = Rollout(
            self.cluster, self.journal, plan, settings, JudgeSettings(), 60.0, self.guard, self.looks.append, clock
        )

    def guard(self) -> None:
        if not self.allowed:
            raise SafetyError("the lease was lost")

    def run(self) -> Verdict:
        self.rollout.deploy_canary()
        for weight in self.rollout.plan.steps:
            verdict = self.rollout.run_step(weight, self.cluster.paired)
            if verdict.decision is not Decision.advance:
                break
        return verdict


def test_a_healthy_version_goes_through_every_step_and_is_promoted() -> None:
    case = Case(Behaviour())
    aliases = AliasBook()
    verdict = case.run()
    case.rollout.promote(aliases, by="t", reason="good")
    assert verdict.decision is Decision.promote
    assert list(dict.fromkeys(look.step for look in case.looks)) == ["shadow", "5%", "25%", "50%"]
    assert case.cluster.versions == {Track.stable: NEW}
    assert case.cluster.weights == {Track.stable: 1.0}
    assert aliases.moves == [("production", NEW)]
    assert [(entry.version, entry.by, entry.reason) for entry in case.cluster.memory().served] == [
        (str(NEW), "t", "good")
    ]


def test_the_champion_is_kept_without_traffic_where_settings_ask_for_it() -> None:
    case = Case(Behaviour())
    case.rollout.keep_previous_s = 600
    case.rollout.promote(AliasBook(), by="t", reason="good")
    assert case.cluster.versions == {Track.stable: NEW, Track.previous: OLD}
    assert case.cluster.weights == {Track.stable: 1.0}
    memory, now = case.cluster.memory(), case.cluster.now()
    assert memory.is_kept(OLD, now)
    status = case.cluster.status()
    assert not is_over(status, memory, now)
    assert is_over(status, memory, now + timedelta(seconds=600))
    assert not is_over(replace(status, weights={Track.previous: 1.0}), memory, now + timedelta(days=1))
    assert case.journal.record.events[-1].text.startswith("v1.0.0 is kept warm on 1 replica(s) until ")
    assert keep_previous(case.cluster, NEW, 0, now) == "v1.0.0 is not kept warm any more"
    assert case.cluster.versions == {Track.stable: NEW}


def test_a_promotion_that_a_rollback_overtook_while_it_waited_moves_nothing() -> None:
    case = Case(Behaviour())
    aliases, wait_ready = AliasBook(), case.cluster.wait_ready

    def overtaken(track: Track, timeout_s: float) -> None:
        wait_ready(track, timeout_s)
        case.cluster.rollback(OLD, 2)
        case.allowed = False

    case.cluster.wait_ready = overtaken  # type: ignore[method-assign]
    with pytest.raises(SafetyError):
        case.rollout.promote(aliases, by="t", reason="good")
    assert aliases.moves == []
    assert case.cluster.versions == {Track.stable: OLD}


@pytest.mark.parametrize(
    ("behaviour", "step", "word"),
    [
        (Behaviour(errors=0.1), "shadow", "with an error"),
        (Behaviour(slow=1.0), "shadow", "took over 250 ms"),
        (Behaviour(differs=0.9, accuracy=0.05), "shadow", "another answer"),
    ],
    ids=["failing", "slow", "wrong"],
)
def test_a_bad_version_meets_no_user(behaviour: Behaviour, step: str, word: str) -> None:
    case = Case(behaviour)
    verdict = case.run()
    assert verdict.decision is Decision.rollback
    assert word in verdict.reasons[0]
    assert case.looks[-1].step == step
    assert case.cluster.answered.get(NEW, 0) == 0


@pytest.mark.parametrize(
    ("behaviour", "word"),
    [
        (Behaviour(errors=0.1), "with an error"),
        (Behaviour(slow=1.0), "took over"),
        (Behaviour(accuracy=0.2), "labelled"),
    ],
    ids=["failing", "slow", "wrong"],
)
def test_without_a_shadow_stage_a_bad_version_is_caught_at_the_first_share(behaviour: Behaviour, word: str) -> None:
    case = Case(behaviour, shadow=0)
    verdict = case.run()
    assert verdict.decision is Decision.rollback
    assert word in verdict.reasons[0]
    assert case.looks[-1].step == "5%"


def test_undo_leaves_only_the_champion() -> None:
    case = Case(Behaviour(errors=0.5))
    case.run()
    case.rollout.undo()
    case.rollout.undo()
    assert case.cluster.versions == {Track.stable: OLD}
    assert case.cluster.weights == {Track.stable: 1.0}


def test_the_intent_is_written_before_the_change() -> None:
    case = Case(Behaviour(becomes_ready=False))
    with pytest.raises(ExternalError):
        case.rollout.deploy_canary()
    assert case.journal.record.intent is not None
    assert (case.journal.record.intent.action, case.journal.record.intent.version) == ("canary", "v1.1.0")


def test_a_promotion_that_never_becomes_ready_puts_the_champion_back() -> None:
    case = Case(Behaviour())
    case.run()
    case.cluster.behaviours[NEW].becomes_ready = False
    aliases = AliasBook()
    with pytest.raises(ExternalError):
        case.rollout.promote(aliases, by="t", reason="good")
    assert case.cluster.versions == {Track.stable: OLD}
    assert aliases.moves == []
    assert case.journal.record.intent is None


def test_without_the_lease_nothing_more_is_changed() -> None:
    case = Case(Behaviour())
    case.rollout.deploy_canary()
    case.allowed = False
    before = list(case.cluster.calls)
    with pytest.raises(SafetyError):
        case.rollout.run_step(0.05, case.cluster.paired)
    assert case.cluster.calls == before


def test_too_little_traffic_ends_inconclusive_at_the_deadline() -> None:
    case = Case(Behaviour(), shadow=0)
    case.cluster.rate_per_s = 0.01
    verdict = case.run()
    assert verdict.decision is Decision.inconclusive
    assert case.cluster.time_s == pytest.approx(600, abs=1)


def test_counters_that_cannot_be_read_are_not_the_canarys_fault() -> None:
    case = Case(Behaviour(), shadow=0)
    case.rollout.deploy_canary()
    sleep = case.cluster.sleep

    def see_again_after_a_while(seconds: float) -> None:
        case.cluster.blind = case.cluster.time_s < 5
        sleep(seconds)

    object.__setattr__(case.rollout.clock, "sleep", see_again_after_a_while)
    verdict = case.rollout.run_step(0.05, case.cluster.paired)
    assert verdict.decision is Decision.advance


def test_the_first_version_is_served_and_judged_by_the_floor() -> None:
    good, bad = Case(Behaviour(accuracy=0.95), champion=None), Case(Behaviour(accuracy=0.5), champion=None)
    for case in (good, bad):
        case.rollout.first_deploy()
    assert good.rollout.judge_first(good.cluster.paired, floor=0.8).decision is Decision.promote
    assert bad.rollout.judge_first(bad.cluster.paired, floor=0.8).decision is Decision.rollback
    bad.rollout.remove_first()
    assert bad.cluster.versions == {}


def test_the_served_version_is_the_one_stable_answers_with() -> None:
    assert served_version(Case(Behaviour()).cluster) == OLD
    assert served_version(Case(Behaviour(), champion=None).cluster) is None


def test_another_deadline_is_waited_for_where_settings_say_so_and_the_record_tells() -> None:
    case = Case(Behaviour(), shadow=0, undecided="extend", max_extensions=2)
    case.cluster.rate_per_s = 0.01
    assert case.run().decision is Decision.inconclusive
    assert case.cluster.time_s == pytest.approx(1800, abs=3)
    assert [event.severity for event in case.journal.record.events] == ["warning", "warning"]
    assert "too little traffic" in case.journal.record.events[0].text


def test_a_baseline_gets_as_much_traffic_as_the_canary_and_goes_with_it() -> None:
    case = Case(Behaviour(), baseline=True)
    verdict = case.run()
    assert verdict.decision is Decision.promote
    assert "weights stable=0.9 baseline=0.05 canary=0.05" in case.cluster.calls
    assert "weights baseline=0.5 canary=0.5" in case.cluster.calls
    assert verdict.evidence["baseline_requests"] == pytest.approx(verdict.evidence["canary_requests"], abs=1)
    case.rollout.promote(AliasBook(), by="t", reason="good")
    assert case.cluster.versions == {Track.stable: NEW}


def test_a_baseline_is_wanted_where_it_differs_from_stable_and_there_is_room() -> None:
    cluster, settings = Case(Behaviour()).cluster, CanarySettings()
    assert wants_baseline(cluster, settings, replicas=3, canary=1)
    assert not wants_baseline(cluster, settings, replicas=1, canary=1)
    cluster.most_replicas = 1
    assert not wants_baseline(cluster, settings, replicas=3, canary=1)
    assert wants_baseline(cluster, CanarySettings(baseline="on"), replicas=1, canary=1)


def test_a_canary_that_dies_under_way_is_rolled_back_after_a_moment() -> None:
    case = Case(Behaviour(), shadow=0, min_samples=100_000)
    case.rollout.deploy_canary()
    sleep = case.cluster.sleep

    def die_at_ten_seconds(seconds: float) -> None:
        case.cluster.behaviours[NEW].becomes_ready = case.cluster.time_s < 10
        sleep(seconds)

    object.__setattr__(case.rollout.clock, "sleep", die_at_ten_seconds)
    verdict = case.rollout.run_step(0.05, case.cluster.paired)
    assert verdict.decision is Decision.rollback
    assert "no replica of the canary" in verdict.reasons[0]
    assert case.cluster.time_s == pytest.approx(12.5, abs=1)


def test_a_canary_that_breaks_after_a_good_hour_is_rolled_back_within_forty_requests() -> None:
    case = Case(Behaviour(), shadow=0, min_samples=10**9, deadline_s=10_000)
    case.rollout.deploy_canary()
    sleep, broken_at = case.cluster.sleep, 3600.0
    case.cluster.canary_breaks_at = broken_at
    served: list[tuple[float, float]] = []

    def watch_it(seconds: float) -> None:
        sleep(seconds)
        served.append((case.cluster.time_s, case.cluster.answered[NEW]))

    object.__setattr__(case.rollout.clock, "sleep", watch_it)
    verdict = case.rollout.run_step(0.05, case.cluster.paired)
    good = max(answered for at, answered in served if at <= broken_at)
    assert verdict.decision is Decision.rollback
    assert "each of its last" in verdict.reasons[0]
    assert served[-1][1] - good <= 45
