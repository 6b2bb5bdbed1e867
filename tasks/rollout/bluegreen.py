"""Blue-green: the new version (green) stands ready beside the old one (blue) on as many replicas, and takes all traffic
at once. Plain Python over the rollout and the Cluster Protocol.

Green is the canary track. While it is watched, its traffic hangs on the cluster's lease, so that blue serves again when
the flow dies. What ends well is settled: blue's replicas are replaced by the new version while they have no traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from configs.errors import GateError
from ml.version import Version
from tasks.rollout.procedure import Aliases, Labels, Look, Plan, Rollout
from tasks.rollout.verdict import Verdict


@dataclass(frozen=True, slots=True)
class Smoke:
    """One prediction that green was asked for: `status` 0 where no answer came."""

    status: int
    version: str
    answer: str


def plan_blue_green(version: Version, champion: Version, replicas: int, classes: int) -> Plan:
    """Green gets as many replicas as blue has, and mirrored traffic only before the switch."""
    return Plan(version, champion, (0.0,), replicas, replicas, classes)


def check_smoke(answers: list[Smoke], version: Version) -> None:
    """Every answer came, names a class and is this version's.

    Raises:
        GateError: one is not so.
    """
    for number, seen in enumerate(answers, 1):
        if (seen.status, seen.version) != (200, str(version)) or not seen.answer:
            raise GateError(
                f"smoke prediction {number} of {len(answers)}: green answered HTTP {seen.status} as "
                f"{seen.version or 'no version'}, not 200 as {version}. No user met it."
            )


@dataclass(frozen=True, slots=True)
class BlueGreen:
    """A rollout whose canary is green. `switch` sends all traffic to it, at once."""

    rollout: Rollout
    switch: Callable[[float | None], object]

    def verify(self, labels: Labels) -> Verdict:
        """Judge green on mirrored traffic; no user meets it."""
        return self.rollout.run_step(0.0, labels)

    def watch(self, labels: Labels, seconds: float, floor: float) -> Look:
        """All traffic to green, watched for `seconds` against fixed limits: blue gets none to be compared with."""
        self.rollout.guard()
        self.switch(self.rollout.canary.lease_s)
        return self.rollout.watch(1.0, labels, seconds, floor)

    def switch_back(self) -> None:
        """All traffic to blue, at once; green goes."""
        self.rollout.undo()

    def settle(self, aliases: Aliases, *, by: str, reason: str) -> None:
        """Make it production: blue's replicas are replaced, the alias is moved, green goes.

        Raises:
            ExternalError: blue's replicas could not be replaced; blue serves again as it was.
        """
        plan = self.rollout.plan
        self.rollout.guard()
        self.rollout.journal.intend("promote", str(plan.version), str(plan.champion))
        # It was judged: its traffic needs nobody to hold it while blue is replaced.
        self.switch(None)
        self.rollout.promote(aliases, by=by, reason=reason)
