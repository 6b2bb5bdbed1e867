"""What a release report says: one frozen record that the release flow fills and that every rendering reads.

Everything but the header is optional, so that a release that was gated, failed in training or only rehearsed has a
report too. Shares are in [0, 1], durations in seconds, latencies in milliseconds, sizes in bytes, times aware UTC.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, Field, NonNegativeFloat, NonNegativeInt

from configs.base import Probability
from ml.results import Evaluation, ExportResult, Record, TrainResult

Outcome = Literal["promoted", "gated", "rolled_back", "declined", "failed", "dry_run"]
StageState = Literal["done", "cached", "failed", "skipped", "planned"]
Severity = Literal["info", "good", "warning", "bad"]
Unit = Literal["share", "ms", "bytes", "count", "score"]
Bound = Literal["at_least", "at_most", "equal"]


class StageLine(Record):
    """One stage of the flow. `cached`: its result was kept from an earlier attempt; `planned`: a dry run shows it."""

    name: str
    state: StageState
    started_at: AwareDatetime | None = None
    duration_s: NonNegativeFloat | None = None
    note: str = ""


class GateRow(Record):
    """One gate: `value` must be `bound` `limit`. `ok` None: too few `samples` to say.

    A gate on traffic has evidence for harm (`log_evidence`, natural logarithm of odds, None: none at all), which is
    held against `log_threshold`; that is None for a gate that is a plain limit. `low` and `high` enclose the true
    value. Harm in a gate that is not `critical` only stops the promotion; a `dry_run` gate is only reported.
    """

    gate: str
    value: float | None
    limit: float | None
    ok: bool | None
    samples: NonNegativeInt | None = None
    bound: Bound = "at_least"
    unit: Unit = "score"
    champion: float | None = Field(default=None, description="The champion's or baseline's value, in the same unit.")
    note: str = ""
    log_evidence: float | None = None
    log_threshold: float | None = None
    low: float | None = None
    high: float | None = None
    critical: bool = True
    dry_run: bool = False

    @property
    def by_evidence(self) -> bool:
        """Whether evidence decides it, and not a plain limit."""
        return self.log_threshold is not None


class VerdictView(Record):
    """A decision as people read it: sentences in `reasons`, rows behind them in `gates`, raw numbers in `evidence`."""

    decision: str
    reasons: tuple[str, ...] = ()
    gates: tuple[GateRow, ...] = ()
    evidence: dict[str, float] = Field(default_factory=dict)


class VersionCounters(Record):
    """What one version did since the rollout began. Latencies are None before the first answer.

    `errors` are 5xx answers and broken connections, `slow` answers above the latency objective, `probes` labelled
    images that both versions answered. `shadow_pairs` are mirrored requests whose two answers were compared,
    `shadow_differ` those whose class differed and `shadow_errors` those that failed (counted on the challenger).
    """

    version: str
    requests: NonNegativeInt = 0
    errors: NonNegativeInt = 0
    slow: NonNegativeInt = 0
    p50_ms: float | None = None
    p99_ms: float | None = None
    probes: NonNegativeInt = 0
    probes_correct: NonNegativeInt = 0
    shadow_pairs: NonNegativeInt = 0
    shadow_differ: NonNegativeInt = 0
    shadow_errors: NonNegativeInt = 0

    @property
    def answered(self) -> int:
        """Requests it was given, users' and mirrored ones."""
        return self.requests + self.shadow_pairs + self.shadow_errors


class CanaryLook(Record):
    """One look at the evidence. `weight` is the challenger's share of user traffic at that moment (0 in shadow).

    `step` is the label people see ("shadow", "5 %", ...). `decision` is the judge's word; `continue` or `wait` means
    that the step goes on, anything else ended it. On a first release there is no champion. `evidence` maps a gate to
    the natural logarithm of its evidence for harm (None: none at all), which is held against `log_threshold`.
    """

    at: AwareDatetime
    step: str
    weight: Probability
    challenger: VersionCounters
    champion: VersionCounters | None = None
    decision: str = "continue"
    reasons: tuple[str, ...] = ()
    evidence: dict[str, float | None] = Field(default_factory=dict)
    log_threshold: float | None = None


class TimelineEvent(Record):
    """Something that happened, in one sentence."""

    at: AwareDatetime
    text: str
    severity: Severity = "info"


class FileLine(Record):
    """One file of the published version."""

    name: str
    sha256: str
    size_bytes: NonNegativeInt


class ReleaseReport(Record):
    """Everything one release run has to say.

    `version` is None until one was allocated, `champion_version` on a first release. `reasons` are the sentences under
    the headline, most important first. `lineage` (commit, dirty, data hash, seed, lock hash, hardware, parent) and
    `config` are shown as they are, nested mappings flattened with dots. `links` maps a label to an address or path
    (Prefect run, service, place in the object store). Pictures are given when rendering, by the names in `evaluation`.
    """

    release_id: str
    title: str
    version: str | None
    champion_version: str | None
    outcome: Outcome
    reasons: tuple[str, ...] = ()
    started_at: AwareDatetime
    finished_at: AwareDatetime
    requested_by: str
    stages: tuple[StageLine, ...] = ()
    train: TrainResult | None = None
    export: ExportResult | None = None
    evaluation: Evaluation | None = None
    champion_evaluation: Evaluation | None = None
    gate: VerdictView | None = Field(default=None, description="The verdict on the holdout, before any traffic.")
    canary: VerdictView | None = Field(default=None, description="The last verdict on live traffic.")
    looks: tuple[CanaryLook, ...] = ()
    events: tuple[TimelineEvent, ...] = ()
    lineage: dict[str, Any] = Field(default_factory=dict)
    config: dict[str, Any] = Field(default_factory=dict)
    files: tuple[FileLine, ...] = ()
    links: dict[str, str] = Field(default_factory=dict)
