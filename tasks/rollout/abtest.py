"""What an A/B test found: the difference between two versions, with intervals that hold at every look. Pure.

Intervals are confidence sequences (tasks.rollout.anytime), so reading them while the test runs, and stopping because of
them, is allowed. They take requests for independent. A user's own requests are alike, and the more of them one user
sends the further the truth may lie outside: count users where that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from tasks.rollout.anytime import Rate, difference_interval, rate_interval
from tasks.rollout.verdict import Evidence

# A split further off than this by chance alone happens in one test of a thousand (Fabijan et al., "Diagnosing sample
# ratio mismatch in online controlled experiments", KDD 2019, use a threshold of that order).
_MISMATCH_ALPHA: Final = 0.001


@dataclass(frozen=True, slots=True)
class Effect:
    """One measure in both versions. `low` and `high` enclose the true rate of B minus that of A."""

    name: str
    a: Rate
    b: Rate
    low: float
    high: float

    @property
    def difference(self) -> float:
        """B minus A, as observed."""
        return self.b.share - self.a.share

    @property
    def shown(self) -> bool:
        """Whether the versions differ for certain, as far as the interval is."""
        return not self.low <= 0.0 <= self.high

    @property
    def sentence(self) -> str:
        """For people."""
        seen = (
            f"{self.name}: {self.a.share:.2%} of {self.a.total:,} with A, {self.b.share:.2%} of {self.b.total:,} with B"
        )
        if not (self.a.total and self.b.total):
            return f"{seen}: nothing to compare"
        word = ("more with B" if self.difference > 0 else "fewer with B") if self.shown else "no difference shown"
        return f"{seen}: {word} ({self.low:+.2%} to {self.high:+.2%})"


def effects(a: Evidence, b: Evidence, labels: Mapping[str, tuple[Rate, Rate]], alpha: float) -> list[Effect]:
    """The effect on every measure; together they are wrong with a probability of at most `alpha`.

    `labels`: wrong answers of A and B by the source of the labels.
    """
    pairs = {
        "errors": (Rate(a.errors, a.requests), Rate(b.errors, b.requests)),
        "slow answers": (Rate(a.slow, a.requests), Rate(b.slow, b.requests)),
        "no leaf seen": (Rate(a.ood, a.predictions), Rate(b.ood, b.predictions)),
        **{
            f"answer {name}": (Rate(a.classes.get(name, 0), a.predictions), Rate(b.classes.get(name, 0), b.predictions))
            for name in sorted({*a.classes, *b.classes})
        },
        **{f"wrong answers ({source})": both for source, both in labels.items()},
    }
    each = alpha / len(pairs)  # Bonferroni: all intervals hold together
    return [_effect(name, one, other, each) for name, (one, other) in pairs.items()]


def _effect(name: str, a: Rate, b: Rate, alpha: float) -> Effect:
    low, high = difference_interval(b, a, alpha) if a.total and b.total else (-1.0, 1.0)
    return Effect(name, a, b, low, high)


def mismatch(a: Evidence, b: Evidence, share: float) -> str:
    """A sentence when B's share of the requests is not what the split should have made it, else "". Then something
    keeps requests from one version, and no effect can be trusted."""
    got = Rate(b.requests, a.requests + b.requests)
    if not got.total:
        return "no request was counted"
    low, high = rate_interval(got, _MISMATCH_ALPHA)
    if low <= share <= high:
        return ""
    return (
        f"B got {got.share:.1%} of {got.total:,} requests instead of {share:.1%}: the split is not the planned one, "
        "so the effects below may come from who was asked"
    )


def conclusion(found: list[Effect], warning: str) -> tuple[str, ...]:
    """The test in sentences: what differs, or that nothing does."""
    shown = [effect.sentence for effect in found if effect.shown]
    narrow = max((effect.high - effect.low for effect in found if effect.name == "errors"), default=2.0)
    nothing = f"no difference between the versions was shown (errors are known within {narrow / 2:.2%})"
    return (*([warning] if warning else ()), *(shown or (nothing,)))
