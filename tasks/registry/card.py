"""The model card: what a person needs to know before trusting a version. A pure function of the release's records.

The questions are those of Mitchell et al., Model Cards for Model Reporting, FAT* 2019.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml.bundle import Lineage
from ml.results import ClassScore, Evaluation, ExportResult, ModelMetadata, TrainResult
from ml.version import Version

if TYPE_CHECKING:
    from jinja2 import Template

CARD = "model_card.md"
_TEMPLATE = Path(__file__).with_name("card.md.j2")
_SHOWN_CONFUSIONS = 5


@dataclass(frozen=True, slots=True)
class Confusion:
    """`count` of the `support` images of class `label` were taken for `predicted`."""

    label: str
    predicted: str
    count: int
    support: int


def render_card(
    version: Version,
    evaluation: Evaluation,
    trained: TrainResult,
    exported: ExportResult,
    metadata: ModelMetadata,
    lineage: Lineage,
) -> str:
    """The card as Markdown. Pictures are named relative to the version's folder."""
    return _template().render(
        version=str(version),
        evaluation=evaluation,
        trained=trained,
        exported=exported,
        metadata=metadata,
        lineage=lineage,
        weakest=weakest_class(evaluation),
        confusions=confusions(evaluation)[:_SHOWN_CONFUSIONS],
    )


def weakest_class(evaluation: Evaluation) -> ClassScore | None:
    """The class with the lowest recall among those that have images."""
    return min((c for c in evaluation.classes if c.support), key=lambda c: c.recall, default=None)


def confusions(evaluation: Evaluation) -> list[Confusion]:
    """Which classes are taken for which, most frequent first."""
    names = [score.name for score in evaluation.classes]
    found = [
        Confusion(names[i], names[j], count, sum(row))
        for i, row in enumerate(evaluation.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(found, key=lambda pair: (-pair.count, pair.label, pair.predicted))


@functools.lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=False,  # noqa: S701  (Markdown, not HTML: `_markdown` escapes every value)
        undefined=StrictUndefined,
        finalize=_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": _percent, "size": _size, "duration": _duration, "number": _number}
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _markdown(value: Any) -> str:
    """Every value in the card: one line, no HTML, no table cell or code span broken open."""
    text = "unknown" if value is None else str(value)
    for plain, safe in (("\n", " "), ("<", "&lt;"), ("|", "\\|"), ("`", "'")):
        text = text.replace(plain, safe)
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _size(count: int) -> str:
    if count < 1_000_000:
        return f"{count / 1000:.0f} kB"
    return f"{count / 1_000_000:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
