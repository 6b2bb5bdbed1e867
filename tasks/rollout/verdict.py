"""What a judge is given and what it answers: plain values, written as JSON into the audit log and read by people."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from tasks.rollout.anytime import Rate


class Decision(enum.StrEnum):
    """What to do next."""

    wait = "continue"
    advance = "advance"
    promote = "promote"
    rollback = "rollback"
    inconclusive = "inconclusive"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was counted for one version on one track since the rollout began.

    `slow`: over the latency objective. `latency` and `shadow_latency`: cumulative counts by a bucket's upper bound in
    ms, as in Prometheus. `predictions` are answers that named a class, `classes` how often each was named, `ood` how
    many said "not a leaf". `shadow_by_class`: the champion's class to (pairs, pairs that differ).
    """

    requests: int = 0
    errors: int = 0
    slow: int = 0
    predictions: int = 0
    ood: int = 0
    classes: Mapping[str, int] = field(default_factory=dict)
    latency: Mapping[float, int] = field(default_factory=dict)
    shadow_pairs: int = 0
    shadow_differ: int = 0
    shadow_errors: int = 0
    shadow_slow: int = 0
    shadow_latency: Mapping[float, int] = field(default_factory=dict)
    shadow_by_class: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    p50_ms: float | None = None
    p99_ms: float | None = None

    @property
    def shadow_requests(self) -> int:
        """Mirrored requests that were answered or failed."""
        return self.shadow_pairs + self.shadow_errors

    def numbers(self) -> dict[str, float]:
        """The single numbers by name, for machines."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: float(value) for name, value in named.items() if isinstance(value, int | float)}


@dataclass(frozen=True, slots=True)
class Paired:
    """Labelled images that champion and challenger both answered, each image once.

    `losses`: only the champion was right; `wins`: only the challenger was; `both`: both were.
    """

    pairs: int = 0
    losses: int = 0
    wins: int = 0
    both: int = 0

    @property
    def challenger(self) -> Rate:
        """The challenger's wrong answers."""
        return Rate(self.pairs - self.both - self.wins, self.pairs)

    @property
    def champion(self) -> Rate:
        """The champion's wrong answers."""
        return Rate(self.pairs - self.both - self.losses, self.pairs)


@dataclass(frozen=True, slots=True)
class GateReading:
    """One gate: what was seen and what is allowed. `ok` None: too few samples to say.

    `value` and `limit` are shares unless the gate's name says otherwise. `log_evidence` (natural logarithm) speaks for
    harm and is held against `log_threshold`; both are None where a gate is a plain limit. `low` and `high` enclose the
    true value. Harm in a gate that is not `critical` stops the promotion and undoes nothing; a `dry_run` gate is only
    reported. `reference` is the baseline's or champion's value; None where `limit` is fixed.
    """

    name: str
    value: float
    limit: float
    samples: int
    ok: bool | None
    sentence: str
    log_evidence: float | None = None
    log_threshold: float | None = None
    low: float | None = None
    high: float | None = None
    critical: bool = True
    dry_run: bool = False
    reference: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it has a say."""
        return not self.dry_run

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that JSON does not know become None."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do next, and why: `reasons` are sentences for people, `readings` and `evidence` are for machines."""

    decision: Decision
    reasons: tuple[str, ...]
    readings: tuple[GateReading, ...]
    evidence: Mapping[str, float]

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        return f"{_PAST[self.decision]}: {'; '.join(self.reasons)}"

    def to_json(self) -> dict[str, Any]:
        """As the audit log keeps it."""
        return {
            "decision": self.decision.value,
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "gates": [reading.to_json() for reading in self.readings],
            "evidence": {name: _plain(value) for name, value in self.evidence.items()},
        }


_PAST = {
    Decision.wait: "undecided",
    Decision.advance: "advanced",
    Decision.promote: "promoted",
    Decision.rollback: "rolled back",
    Decision.inconclusive: "inconclusive",
}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NOTHING: Final = Rate(0, 0)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the rollout stands: `weight` 0 is the shadow stage.

    `needed` canary samples decide it, on top of those `seen_before` it began. `floor` is the accuracy asked of a
    version that has no champion to be compared with. `classes` is how many classes both versions know; 0 where their
    answers cannot be compared. `ready` False: no replica of the canary takes requests any more. `recent`: errors and
    requests of the canary just now, for the hard guard.
    """

    weight: float
    needed: int
    last: bool
    elapsed_s: float
    deadline_s: float
    seen_before: int = 0
    floor: float | None = None
    classes: int = 0
    ready: bool = True
    recent: Rate = _NOTHING
