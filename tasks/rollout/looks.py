"""Looks as the release record keeps them: enough of each to draw the evidence, all of those that decided something.

The record is one small object that is written anew with every look. So a look that decided nothing keeps its counts and
its evidence only, and of many such looks a bounded number stays, spread evenly over the time of the rollout. Pure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from tasks.rollout.procedure import Look
from tasks.rollout.verdict import Decision, Evidence, GateReading, Verdict

Kept = tuple[dict[str, Any], ...]
# At about 1 KB a look, and 5 KB where one decided, a record stays below half a megabyte however long it takes.
MOST_LOOKS: Final = 240
_MOST_LOG: Final = 700.0  # exp of more does not fit into a float
_DIGITS: Final = 4


def to_json(look: Look) -> dict[str, Any]:
    """A look with everything the judge said. Labelled images that both versions answered are called probes."""
    told = look.verdict.evidence
    pairs, both = int(told.get("pairs", 0)), int(told.get("pairs_both", 0))
    won, lost = int(told.get("pairs_won", 0)), int(told.get("pairs_lost", 0))
    readings = look.verdict.readings
    return {
        "at": look.at.isoformat(),
        "step": look.step,
        "weight": look.weight,
        "canary": _counts(look.canary) | {"probes": pairs, "probes_correct": both + won},
        "champion": _counts(look.champion) | {"probes": pairs, "probes_correct": both + lost},
        "decision": look.verdict.decision.value,
        "reasons": list(look.verdict.reasons),
        "evidence": {reading.name: _log(reading) for reading in readings},
        "log_threshold": next((r.log_threshold for r in readings if r.log_threshold is not None), None),
        "readings": [_finite(dataclasses.asdict(r)) | {"log_evidence": _log(r)} for r in readings],
    }


def _counts(side: Evidence) -> dict[str, int | float]:
    """Single numbers; histograms stay out of the record."""
    named = {name: getattr(side, name) for name in side.__dataclass_fields__}
    return {name: value for name, value in _finite(named).items() if isinstance(value, int | float)}


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rounded floats; what JSON cannot write becomes None."""
    return {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}


def _rounded(value: float) -> float | None:
    return round(value, _DIGITS) if math.isfinite(value) else None


def _log(reading: GateReading) -> float | None:
    """Evidence without end stays large; without a sample there is none."""
    if reading.log_evidence is None or not reading.samples:
        return None
    return _rounded(min(reading.log_evidence, _MOST_LOG))


def with_look(kept: Kept, look: Mapping[str, Any], most: int = MOST_LOOKS) -> Kept:
    """`kept` and one more look. The last one, and each that ended a step, stay whole; others are cut and thinned."""
    before = [_cut(old) if _goes_on(old) else old for old in kept]
    return tuple(_thinned([*before, dict(look)], most))


def _goes_on(look: Mapping[str, Any]) -> bool:
    return bool(look["decision"] == Decision.wait.value)


def _cut(look: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in look.items() if name != "readings"}


def _thinned(looks: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Drop, one by one, the look whose neighbours are closest in time; the first, the last and decisions stay."""
    while len(looks) > most:
        candidates = [i for i in range(1, len(looks) - 1) if _goes_on(looks[i])]
        if not candidates:
            break
        at = [datetime.fromisoformat(look["at"]).timestamp() for look in looks]
        del looks[min(candidates, key=lambda i: at[i + 1] - at[i - 1])]
    return looks


def last_verdict(kept: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """The verdict of the last look; None without one. Reads older records too, whose readings had no evidence."""
    if not kept:
        return None
    last = kept[-1]
    known = GateReading.__dataclass_fields__
    readings = tuple(
        GateReading(**{name: value for name, value in reading.items() if name in known})
        for reading in last.get("readings", ())
    )
    return Verdict(Decision(last["decision"]), tuple(last["reasons"]), readings, {})
