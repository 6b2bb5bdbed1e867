"""From a file of labels to the table: look up the answers, check the classes, store all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from configs.errors import ConfigError
from tasks.feedback.labels import Answer, Label, read_labels, refuse
from tasks.feedback.predictions import PredictionLog
from tasks.feedback.store import Added, Feedback, FeedbackStore

ClassesOf = Callable[[str], Collection[str]]


def import_labels(
    path: Path,
    store: FeedbackStore,
    log: PredictionLog,
    classes_of: ClassesOf,
    *,
    now: datetime,
    lookup_days: int,
    correct: bool = False,
) -> Added:
    """Import a CSV file (`tasks.feedback.labels`). May be repeated.

    `classes_of` names the classes of a version and raises ConfigError where it is not published: a misspelt label
    would count as a wrong answer.

    Raises:
        ConfigError: lines are wrong, or their predictions are not in the log of the last `lookup_days` days.
        IntegrityError: labels contradict stored ones.
        ExternalError: a system does not answer.
    """
    answered = _with_answers(path, read_labels(path, now), log, now, lookup_days)
    refuse(path, [*_contradicting(answered), *_unknown_classes(answered, classes_of)])
    feedback = [Feedback(of.request_id, of.source, of.label, answer, of.received_at) for of, answer in answered]
    return store.add(feedback, correct=correct)


def _with_answers(
    path: Path, labels: Sequence[Label], log: PredictionLog, now: datetime, days: int
) -> list[tuple[Label, Answer]]:
    """Every label with what was answered, from the file or the log."""
    wanted = {label.request_id for label in labels if label.answer is None}
    found = log.find(wanted, now.date(), days) if wanted else {}
    refuse(path, list(_not_found(labels, found, days)))
    return [(label, label.answer or next(iter(found[label.request_id]))) for label in labels]


def _not_found(labels: Sequence[Label], found: Mapping[str, set[Answer]], days: int) -> Iterator[str]:
    for label in labels:
        answers = found.get(label.request_id, set())
        if label.answer is None and not answers:
            yield f"line {label.line}: {label.request_id} is not in the inference log of the last {days} days"
        if label.answer is None and len(answers) > 1:
            several = f"{label.request_id} was answered {len(answers)} times"
            yield f"line {label.line}: {several}; say which in version, predicted and predicted_at"


def _contradicting(answered: Sequence[tuple[Label, Answer]]) -> Iterator[str]:
    """Two sources may label one prediction, and then they must mean the same answer."""
    first: dict[str, tuple[Label, Answer]] = {}
    for label, answer in answered:
        other, theirs = first.setdefault(label.request_id, (label, answer))
        if theirs != answer:
            yield f"line {label.line}: {label.request_id} was answered otherwise by line {other.line}"


def _unknown_classes(answered: Sequence[tuple[Label, Answer]], classes_of: ClassesOf) -> Iterator[str]:
    known: dict[str, Collection[str] | str] = {}
    for label, answer in answered:
        if answer.version not in known:
            known[answer.version] = _classes(answer.version, classes_of)
        classes = known[answer.version]
        if isinstance(classes, str):
            yield f"line {label.line}: {classes}"
            continue
        for name in (label.label, answer.predicted):
            if name not in classes:
                yield f"line {label.line}: {name!r} is no class of {answer.version} ({', '.join(sorted(classes))})"


def _classes(version: str, classes_of: ClassesOf) -> Collection[str] | str:
    """The classes of a version, or why there are none."""
    try:
        return classes_of(version)
    except ConfigError as error:
        return str(error).partition("\n")[0]
