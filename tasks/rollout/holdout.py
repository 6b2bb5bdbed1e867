"""The gate's verdict on a holdout, and how often that holdout has decided.

Every release that is judged leaves a small record, `holdouts/<hash>/<release>.json` in the models bucket. Each decision
leaks a little of the holdout into what is chosen next, so its scores grow optimistic with use (Dwork et al., Science
2015). Nothing is forbidden here; the count makes the wear visible.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import AwareDatetime

from configs.areas import GateSettings
from ml.objects import ObjectStore
from ml.predictions import Predictions
from ml.results import Evaluation, ExportResult, Record
from tasks.rollout.gate import comparable, gate
from tasks.rollout.journal import utc_now
from tasks.rollout.paired import Pairs, pair
from tasks.rollout.verdict import Verdict

PREFIX = "holdouts/"


class HoldoutUse(Record):
    """One release that was decided on a holdout. `version` is None where the release never had one."""

    release_id: str
    decided_at: AwareDatetime
    decision: str
    model_sha256: str
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A model's scores on the holdout, and the file with its single answers."""

    evaluation: Evaluation
    predictions: Path


class Ledger:
    """The uses of every holdout, in the models bucket."""

    def __init__(self, store: ObjectStore, bucket: str, now: Callable[[], datetime] = utc_now) -> None:
        self._store, self._bucket, self._now = store, bucket, now

    def decide(
        self,
        release_id: str,
        challenger: Scored,
        exported: ExportResult,
        champion: Scored | None,
        healthy: Collection[str],
        limits: GateSettings,
        version: str | None,
    ) -> Verdict:
        """Hold the challenger against floors and champion, and count that as a use. `healthy`: classes without disease.

        Raises:
            IntegrityError: the two models did not answer the same images; nothing was decided or counted.
            ExternalError: the object store is away.
        """
        holdout = challenger.evaluation.holdout_hash
        verdict = gate(
            challenger.evaluation,
            exported,
            champion.evaluation if champion else None,
            limits,
            pairs=_pairs(challenger, champion, healthy),
            holdout_uses=len(self.deciders(holdout) | {release_id}),
        )
        use = HoldoutUse(
            release_id=release_id,
            decided_at=self._now(),
            decision=verdict.decision.value,
            model_sha256=exported.sha256,
            version=version,
        )
        self._write(holdout, use)
        return verdict

    def deciders(self, holdout_hash: str) -> frozenset[str]:
        """Ids of the releases that this holdout has decided."""
        folder = f"{PREFIX}{holdout_hash}/"
        keys = [info.key for info in self._store.list(self._bucket, folder)]
        return frozenset(key.removeprefix(folder).removesuffix(".json") for key in keys)

    def use(self, holdout_hash: str, release_id: str) -> HoldoutUse:
        """The record of one decided release.

        Raises:
            ObjectMissing: it was not decided on this holdout.
        """
        return HoldoutUse.model_validate_json(self._store.get(self._bucket, _key(holdout_hash, release_id)))

    def name_version(self, holdout_hash: str, release_id: str, version: str) -> None:
        """Note the version that a decided release became. Raises as `use` does."""
        self._write(holdout_hash, self.use(holdout_hash, release_id).model_copy(update={"version": version}))

    def _write(self, holdout_hash: str, use: HoldoutUse) -> None:
        """A release that is decided again, after a resume, replaces its own record: it counts once."""
        data = (use.model_dump_json(indent=1) + "\n").encode()
        self._store.put(self._bucket, _key(holdout_hash, use.release_id), data, content_type="application/json")


def _key(holdout_hash: str, release_id: str) -> str:
    return f"{PREFIX}{holdout_hash}/{release_id}.json"


def _pairs(challenger: Scored, champion: Scored | None, healthy: Collection[str]) -> Pairs | None:
    """Both models' answers side by side; None where they cannot be compared."""
    if champion is None or not comparable(challenger.evaluation, champion.evaluation):
        return None
    return pair(Predictions.read(challenger.predictions), Predictions.read(champion.predictions), healthy)
