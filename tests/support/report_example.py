"""Releases to look at: realistic reports in every state, used by the tests and to look at the page.

Run `python -m tests.support.report_example FOLDER` to write each as HTML and markdown.
"""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from configs.areas import GateSettings, JudgeSettings
from ml.predictions import Predictions
from ml.results import ClassScore, Epoch, Evaluation, ExportResult, Mistake, SeverityScore, TrainResult
from tasks.report.model import (
    CanaryLook,
    FileLine,
    ReleaseReport,
    StageLine,
    StageState,
    TimelineEvent,
    VersionCounters,
)
from tasks.report.views import evidence_by_gate, holdout_view, traffic_view
from tasks.rollout.anytime import Rate
from tasks.rollout.gate import gate
from tasks.rollout.paired import pair
from tasks.rollout.policy import judge
from tasks.rollout.verdict import Decision, Evidence, Paired, Stage, Verdict

BEGAN = datetime(2026, 11, 20, 6, 12, 4, tzinfo=UTC)
CLASSES = (
    "bacterial_spot", "early_blight", "healthy", "late_blight",
    "leaf_mold", "mosaic_virus", "septoria_leaf_spot", "spider_mites",
)  # fmt: skip
_SHA = "9f2c41aa07d5e6b3c8812f4d9a3be0571c6d24f8a9057be31d6c0f42e88b7a15"


def epochs(count: int = 24, seconds: float = 58.0) -> tuple[Epoch, ...]:
    """A training curve that settles near 95 %."""
    rng = np.random.default_rng(3)
    return tuple(
        Epoch(
            epoch=i,
            step=88 * (i + 1),
            elapsed_s=seconds * (i + 1) / count,
            train_loss=0.42 + 1.5 * math.exp(-i / 4.5) + float(rng.normal(0, 0.012)),
            val_loss=0.30 + 1.4 * math.exp(-i / 4.0) + float(rng.normal(0, 0.03)),
            val_accuracy=min(0.955, 0.955 - 0.62 * math.exp(-i / 4.2) + float(rng.normal(0, 0.008))),
            learning_rate=4e-3,
            images_per_s=2014.0 + float(rng.normal(0, 30)),
        )
        for i in range(count)
    )


def training(**changes: Any) -> TrainResult:
    """One training run on the sample data."""
    values: dict[str, Any] = {
        "checkpoint": Path("best.ckpt"), "net": "convnet", "px": 64, "seed": 7, "epochs": 24, "steps": 2112,
        "elapsed_s": 58.4, "images_per_s": 2014.0, "best_val_accuracy": 0.9533, "dataset": "leaves",
        "dataset_hash": "41aa9f2c07d5e6b3", "hardware": {"cpu": "2 cores, AVX2", "accelerator": "none"},
        "resumed_from_step": None, "history": epochs(),
    }  # fmt: skip
    return TrainResult(**values | changes)


def exported(**changes: Any) -> ExportResult:
    """An export that passed its checks."""
    values: dict[str, Any] = {
        "onnx": Path("model.onnx"), "sha256": _SHA, "size_bytes": 431_220, "opset": 20, "parity_images": 256,
        "parity_max_abs_diff": 1.2e-7, "parity_argmax_equal": True, "latency_p50_ms": 0.31, "latency_p99_ms": 0.52,
        "torch_latency_p50_ms": 0.83, "int8_considered": True, "int8_taken": False,
        "int8_reason": "1.6 times slower on this CPU",
    }  # fmt: skip
    return ExportResult(**values | changes)


def evaluation(
    accuracy: float = 0.945, names: tuple[str, ...] = CLASSES, seed: int = 1, mistakes: int = 12, each: int = 75
) -> Evaluation:
    """An evaluation whose confusion matrix, recalls and accuracy agree with each other."""
    matrix = _matrix(accuracy, len(names), seed, each)
    images, right = int(matrix.sum()), int(np.trace(matrix))
    low, high = _wilson(right, images)
    scores = tuple(_class_score(matrix, i, name) for i, name in enumerate(names))
    return Evaluation(
        dataset="leaves", dataset_hash="41aa9f2c07d5e6b3", split="test", holdout_hash="c8812f4d9a3be057", images=images,
        accuracy=right / images, accuracy_low=low, accuracy_high=high,
        macro_f1=float(np.mean([s.f1 for s in scores])), missed_disease_rate=0.021 + (0.95 - accuracy) / 4,
        classes=scores,
        by_severity=tuple(
            SeverityScore(low=a, high=b, images=n, accuracy=min(1.0, accuracy + d))
            for a, b, n, d in ((0, 0.2, 118, -0.13), (0.2, 0.4, 141, -0.02), (0.4, 0.6, 133, 0.03), (0.6, 1, 133, 0.05))
        ),
        confusion=tuple(tuple(int(v) for v in row) for row in matrix),
        ece_before=0.0604, ece_after=0.0092, temperature=0.7812, ood_threshold=-3.1, ood_flagged_share=0.013,
        latency_p50_ms=0.31 + (0.95 - accuracy) / 10,
        mistakes=tuple(_mistake(i, names) for i in range(mistakes)),
        pictures=("confusion.png", "reliability.png"),
    )  # fmt: skip


def _matrix(accuracy: float, classes: int, seed: int, each: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    matrix = np.zeros((classes, classes), dtype=int)
    for i in range(classes):
        good = min(0.995, max(0.5, accuracy + float(rng.normal(0, 0.03))))
        shares = rng.dirichlet(np.full(classes, 0.35)) * (1 - good)
        shares[i] += 1 - shares.sum()
        matrix[i] = rng.multinomial(each, shares)
    return matrix


def _class_score(matrix: np.ndarray[Any, Any], i: int, name: str) -> ClassScore:
    support, right, answered = int(matrix[i].sum()), int(matrix[i, i]), int(matrix[:, i].sum())
    recall, precision = right / support, right / max(1, answered)
    low, high = _wilson(right, support)
    return ClassScore(
        name=name, support=support, recall=recall, recall_low=low, recall_high=high, precision=precision,
        f1=2 * recall * precision / max(1e-9, recall + precision),
    )  # fmt: skip


def _wilson(right: int, total: int) -> tuple[float, float]:
    z, p = 1.96, right / total
    middle, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def holdout_verdict(ours: Evaluation, theirs: Evaluation) -> Verdict:
    """The gate's verdict on two models that err on the same photos as far as their matrices allow."""
    pairs = pair(_predictions(ours), _predictions(theirs), [name for name in CLASSES if "healthy" in name])
    return gate(ours, exported(), theirs, GateSettings(), pairs=pairs)


def _predictions(result: Evaluation) -> Predictions:
    """Single answers that add up to the confusion matrix, each class's right ones first."""
    names = [c.name for c in result.classes]
    answers = [
        (names[i], names[j])
        for i, row in enumerate(result.confusion)
        for j in sorted(range(len(row)), key=lambda j, i=i: j != i)
        for _ in range(row[j])
    ]
    label, predicted = np.array(answers, dtype=object).T
    image = np.array([f"{k:05d}" for k in range(len(answers))], dtype=object)
    return Predictions(image, label, predicted, image)


def _mistake(i: int, names: tuple[str, ...]) -> Mistake:
    label, predicted = names[(3 * i + 1) % len(names)], names[(5 * i + 2) % len(names)]
    if label == predicted:
        predicted = names[(5 * i + 3) % len(names)]
    return Mistake(
        path=f"test/{label}/leaf_{1000 + 37 * i}.jpg", label=label, predicted=predicted,
        probability=0.995 - 0.021 * i, picture=f"mistake_{i:02d}.png",
    )  # fmt: skip


def pictures(count: int = 12, side: int = 128) -> dict[str, bytes]:
    """A photo beside its heat map for each mistake, and a reliability diagram."""
    made = {f"mistake_{i:02d}.png": _mistake_picture(i, side) for i in range(count)}
    return made | {"reliability.png": _reliability_picture()}


def _mistake_picture(seed: int, side: int) -> bytes:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    turn = rng.uniform(-0.7, 0.7)
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    leaf = (np.abs(v) < 0.55 * np.clip(1 - u * u, 0, 1) ** 0.8)[..., None]
    photo = np.where(leaf, [74, 132, 58], [120, 98, 74]) + rng.normal(0, 9, (side, side, 1))
    heat = np.zeros((side, side))
    for _ in range(9):
        cx, cy, r = *rng.uniform(-0.6, 0.6, 2), rng.uniform(0.04, 0.11)
        spot = np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r * r))
        photo = photo * (1 - 0.7 * spot[..., None] * leaf) + 0.7 * spot[..., None] * leaf * np.array([104, 66, 30])
        heat += spot * rng.uniform(0, 1)
    hot = np.stack([255 * np.clip(heat, 0, 1), 120 * np.clip(heat, 0, 1), 60 * (1 - np.clip(heat, 0, 1))], -1)
    both = np.concatenate([photo, 0.5 * photo + 0.5 * hot], axis=1)
    image = Image.fromarray(np.clip(both, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))
    return _png(image)


def _reliability_picture() -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="#777777")
    axes.plot([0.3, 0.5, 0.7, 0.85, 0.95, 0.99], [0.27, 0.52, 0.68, 0.86, 0.955, 0.992], "o-")
    axes.set_xlabel("stated probability")
    axes.set_ylabel("observed accuracy")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


_BOUNDS_MS = (5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, math.inf)
_A_LOOK, _MIRRORED = 160, 24  # user requests and mirrored ones between two looks
_LIMITS = JudgeSettings()
_FIRST = {"100 %": 1.0}
_STEPS = {"shadow": 0.0, "5 %": 0.05, "25 %": 0.25, "50 %": 0.5}


@dataclass
class Side:
    """What one version was seen to do so far. `bad`: slow, failing or wrong."""

    version: str
    rng: np.random.Generator
    requests: int = 0
    errors: int = 0
    ood: int = 0
    shadow_pairs: int = 0
    shadow_differ: int = 0
    classes: Any = field(default_factory=lambda: np.zeros(len(CLASSES), dtype=int))
    latency: Any = field(default_factory=lambda: np.zeros(len(_BOUNDS_MS), dtype=int))
    p50_ms: float | None = None
    p99_ms: float | None = None

    def serve(self, requests: int, bad: str = "") -> None:
        """Answer users."""
        errors = int(self.rng.binomial(requests, 0.05 if bad == "failing" else 0.002))
        took = self.rng.lognormal(math.log(6.0), 0.45, requests - errors) + (300 if bad == "slow" else 0)
        self.requests += requests
        self.errors += errors
        self.ood += int(self.rng.binomial(requests - errors, 0.013))
        self.classes = self.classes + self.rng.multinomial(requests - errors, np.full(len(CLASSES), 1 / len(CLASSES)))
        self.latency = self.latency + np.array([int((took <= bound).sum()) for bound in _BOUNDS_MS])
        self.p50_ms = float(self.rng.normal(307 if bad == "slow" else 6.0, 0.3))
        self.p99_ms = float(self.rng.normal(341 if bad == "slow" else 20.0, 2.0))

    def mirror(self, requests: int) -> None:
        """Answer copies of requests beside the champion."""
        self.shadow_pairs += requests
        self.shadow_differ += int(self.rng.integers(0, 3))

    def evidence(self) -> Evidence:
        """As the judge is given it."""
        latency = dict(zip(_BOUNDS_MS, (int(count) for count in self.latency), strict=True))
        return Evidence(
            requests=self.requests, errors=self.errors, slow=latency[math.inf] - latency[250.0], ood=self.ood,
            predictions=self.requests - self.errors, classes=dict(zip(CLASSES, map(int, self.classes), strict=True)),
            latency=latency, shadow_pairs=self.shadow_pairs, shadow_differ=self.shadow_differ,
            shadow_by_class={CLASSES[0]: (self.shadow_pairs, self.shadow_differ)} if self.shadow_pairs else {},
            p50_ms=self.p50_ms, p99_ms=self.p99_ms,
        )  # fmt: skip

    def counters(self, wrong: Rate) -> VersionCounters:
        """As the report is given it."""
        found = self.evidence()
        return VersionCounters(
            version=self.version, requests=found.requests, errors=found.errors, slow=found.slow, p50_ms=found.p50_ms,
            p99_ms=found.p99_ms, probes=wrong.total, probes_correct=wrong.total - wrong.bad,
            shadow_pairs=found.shadow_pairs, shadow_differ=found.shadow_differ,
        )  # fmt: skip


def rollout(
    plan: Mapping[str, float] | None = None,
    per_step: int = 9,
    *,
    first: bool = False,
    bad: str = "",
    limits: JudgeSettings = _LIMITS,
) -> tuple[tuple[CanaryLook, ...], Verdict]:
    """Looks two seconds apart through the steps of `plan` until the judge ends them, and its last verdict.

    `bad`: slow, failing or wrong from the 25 % step on.
    """
    plan = plan or (_FIRST if first else _STEPS)
    rng = np.random.default_rng(11)
    ours, theirs, paired = Side("v1.3.0", rng), Side("v1.2.0", rng), Paired()
    made: list[CanaryLook] = []
    at = BEGAN + timedelta(seconds=121)
    for step, weight in plan.items():
        each = round(_A_LOOK * weight) or _MIRRORED
        stage = Stage(
            weight=weight, needed=per_step * each, last=step == list(plan)[-1], elapsed_s=20, deadline_s=600,
            seen_before=ours.requests, floor=0.8 if first else None, classes=0 if first else len(CLASSES),
        )  # fmt: skip
        for _ in range(per_step):
            at += timedelta(seconds=2)
            theirs.serve(round(_A_LOOK * (1 - weight)))
            if weight:
                ours.serve(each, bad if weight >= 0.25 else "")
                paired = _more_pairs(paired, each, rng, wrong=bad == "wrong" and weight >= 0.25)
            else:
                ours.mirror(each)
            verdict = judge(ours.evidence(), theirs.evidence(), paired, stage, limits)
            made.append(_look(at, step, weight, ours, None if first else theirs, paired, verdict))
            if verdict.decision is Decision.rollback:
                return tuple(made), verdict
    return tuple(made), verdict


def _more_pairs(before: Paired, images: int, rng: np.random.Generator, *, wrong: bool) -> Paired:
    """Labelled images: both right, only the champion, only the challenger, neither."""
    shares = (0.11, 0.835, 0.01, 0.045) if wrong else (0.92, 0.025, 0.025, 0.03)
    both, lost, won, _ = (int(count) for count in rng.multinomial(images, shares))
    return Paired(before.pairs + images, before.losses + lost, before.wins + won, before.both + both)


def _look(
    at: datetime, step: str, weight: float, ours: Side, theirs: Side | None, paired: Paired, verdict: Verdict
) -> CanaryLook:
    return CanaryLook(
        at=at, step=step, weight=weight, challenger=ours.counters(paired.challenger),
        champion=theirs.counters(paired.champion) if theirs else None, decision=verdict.decision.value,
        reasons=verdict.reasons, log_threshold=verdict.readings[0].log_threshold,
        evidence=evidence_by_gate({r.name: r.log_evidence if r.samples else None for r in verdict.readings}),
    )  # fmt: skip


def looks(per_step: int = 9, *, first: bool = False, bad: str = "") -> tuple[CanaryLook, ...]:
    """The looks of `rollout`."""
    return rollout(per_step=per_step, first=first, bad=bad)[0]


_PLAN = (
    ("check data", 1.9, "8,000 images, nothing quarantined"), ("train", 61.0, "convnet at 64 px, 24 epochs"),
    ("export", 11.2, "float32, parity 1.2e-07"), ("evaluate", 5.4, "600 holdout images"),
    ("gate", 0.1, "7 checks"), ("publish", 2.2, "9 files, signed"), ("deploy canary", 4.6, "1 replica"),
    ("shadow", 18.0, "216 pairs compared"), ("canary", 54.0, "5 %, 25 %, 50 %"), ("promote", 5.1, ""),
    ("verify", 1.3, "20 probes through the gateway"), ("tidy", 0.6, ""),
)  # fmt: skip


def stages(stop: str = "", state: StageState = "done", then: StageState = "skipped") -> tuple[StageLine, ...]:
    """The flow's stages one after another; at `stop` the state is `state`, and `then` after it."""
    made: list[StageLine] = []
    at, stopped = BEGAN + timedelta(seconds=1), False
    for name, seconds, note in _PLAN:
        if stopped:
            made.append(StageLine(name=name, state=then))
            continue
        stopped = name == stop
        made.append(
            StageLine(name=name, state=state if stopped else "done", started_at=at, duration_s=seconds, note=note)
        )
        at += timedelta(seconds=seconds + 0.3)
    return tuple(made)


def _events(made: tuple[CanaryLook, ...]) -> tuple[TimelineEvent, ...]:
    rows = [TimelineEvent(at=BEGAN, text="Release requested by priya; lease taken.")]
    for before, after in itertools.pairwise(made):
        if before.step != after.step:
            text = f"v1.3.0 answers {after.step} of the traffic."
            rows.append(TimelineEvent(at=before.at + timedelta(seconds=0.5), text=text))
    if made and made[-1].decision == "rollback":
        end = made[-1].at + timedelta(seconds=0.4)
        rows.append(TimelineEvent(at=end, text="Traffic of v1.3.0 set to 0; rollback begun.", severity="bad"))
        rows.append(TimelineEvent(at=end + timedelta(seconds=1.3), text="v1.2.0 answers all traffic.", severity="good"))
    elif made:
        text = "v1.3.0 answers all traffic; production points to it."
        rows.append(TimelineEvent(at=made[-1].at + timedelta(seconds=2), text=text, severity="good"))
    return tuple(rows)


LINEAGE: dict[str, Any] = {
    "git_commit": "25451e2b5c63f4c67cdc30daafb90cf557a006ff", "git_dirty": False, "dataset": "leaves",
    "dataset_hash": "41aa9f2c07d5e6b3c8812f4d9a3be0571c6d24f8a9057be31d6c0f42e88b7a15", "seed": 7,
    "lock_sha256": "0571c6d24f8a9057be31d6c0f42e88b7a159f2c41aa07d5e6b3c8812f4d9a3be", "parent": "v1.2.0",
    "hardware": {"cpu": "2 cores, AVX2", "memory": "8 GiB", "accelerator": "none", "platform": "Linux x86-64"},
    "packages": {"python": "3.11.11", "torch": "2.13.0+cpu", "onnxruntime": "1.32.0", "numpy": "2.4.6"},
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "net": "convnet", "px": 64, "budget": {"seconds": 60, "epochs": None}, "batch": 64,
    "optimizer": {"name": "adamw", "learning_rate": 0.004, "weight_decay": 0.05}, "ema": 0.998, "seed": 7,
    "augment": {"flips": True, "gain": 0.15, "white_balance": 0.08},
}  # fmt: skip
FILES = tuple(
    FileLine(name=name, sha256=f"{i:x}{_SHA[1:]}", size_bytes=size)
    for i, (name, size) in enumerate(
        {"model.onnx": 431_220, "metadata.json": 812, "evaluation.json": 9_120, "model-card.md": 3_310,
         "best.ckpt": 1_231_004, "manifest.json": 2_804, "manifest.sig": 64}.items()
    )
)  # fmt: skip


def promoted(**changes: Any) -> ReleaseReport:
    """The second release: everything went well."""
    ours, theirs = evaluation(), evaluation(0.928, seed=5)
    made, verdict = rollout()
    values: dict[str, Any] = {
        "release_id": "r-20261120-061204-7c1e", "title": "Release of leaves to v1.3.0", "version": "v1.3.0",
        "champion_version": "v1.2.0", "outcome": "promoted", "started_at": BEGAN,
        "reasons": (
            *holdout_verdict(ours, theirs).reasons, *verdict.reasons,
        ),
        "finished_at": BEGAN + timedelta(seconds=170), "requested_by": "priya", "stages": stages(),
        "train": training(), "export": exported(), "evaluation": ours, "champion_evaluation": theirs,
        "gate": holdout_view(holdout_verdict(ours, theirs)), "canary": traffic_view(verdict),
        "looks": made, "events": _events(made), "lineage": LINEAGE, "config": CONFIG, "files": FILES,
        "links": {"Object store": "s3://khet-guard-models/v1.3.0/", "Service": "http://127.0.0.1:8080/predict"},
    }  # fmt: skip
    return ReleaseReport(**values | changes)


def first_release() -> ReleaseReport:
    """No champion to compare with."""
    made, verdict = rollout(first=True)
    ours = evaluation()
    return promoted(
        champion_version=None, champion_evaluation=None, looks=made, events=(), canary=traffic_view(verdict),
        gate=holdout_view(gate(ours, exported(), None, GateSettings())), lineage=LINEAGE | {"parent": None},
    )  # fmt: skip


def gated() -> ReleaseReport:
    """A challenger that the holdout stopped, before it had a version."""
    ours, theirs = evaluation(0.71, seed=9), evaluation(0.945)
    verdict = holdout_view(holdout_verdict(ours, theirs))
    return promoted(
        version=None, outcome="gated", evaluation=ours, champion_evaluation=theirs, gate=verdict, canary=None, looks=(),
        reasons=verdict.reasons, events=(), files=(), stages=stages("gate", "failed"),
        finished_at=BEGAN + timedelta(seconds=84),
    )  # fmt: skip


def rolled_back(bad: str = "slow") -> ReleaseReport:
    """A canary that was bad at 25 % of the traffic."""
    made, verdict = rollout(bad=bad)
    return promoted(
        outcome="rolled_back", looks=made, events=_events(made), canary=traffic_view(verdict), reasons=verdict.reasons,
        stages=stages("canary", "failed"), finished_at=BEGAN + timedelta(seconds=152),
    )  # fmt: skip


def failed_in_training() -> ReleaseReport:
    """Training died; nothing else exists."""
    return promoted(
        version=None, outcome="failed", train=None, export=None, evaluation=None, champion_evaluation=None, gate=None,
        canary=None, looks=(), events=(), files=(), lineage={}, stages=stages("train", "failed"),
        reasons=("the loss became NaN in epoch 3; nothing was published and production still serves v1.2.0",),
    )  # fmt: skip


def dry_run() -> ReleaseReport:
    """A rehearsal: the plan only."""
    plan = tuple(StageLine(name=name, state="planned", note=note) for name, _, note in _PLAN)
    return promoted(
        outcome="dry_run", train=None, export=None, evaluation=None, champion_evaluation=None, gate=None, canary=None,
        looks=(), events=(), files=(), stages=plan, reasons=("asked for with --dry-run",),
    )  # fmt: skip


def many_classes() -> ReleaseReport:
    """38 classes with long names, 200 looks, undefined numbers and hostile text."""
    names = tuple(f"Crop_{i:02d}___Cercospora_leaf_spot_with_a_very_long_name_{i}" for i in range(37))
    names = (*names, "<script>alert(1)</script>")
    nan = float("nan")
    ours = evaluation(0.9, names, mistakes=12, each=40)
    scores = (ours.classes[0].model_copy(update={"recall": nan, "recall_low": nan, "recall_high": nan, "support": 0}),)
    ours = ours.model_copy(update={"classes": scores + ours.classes[1:], "ece_after": nan, "missed_disease_rate": None})
    return promoted(
        title="Release <b>bold</b> & \"quoted\"", evaluation=ours, champion_evaluation=None, looks=looks(per_step=50),
        requested_by="<img src=x onerror=alert(1)>", reasons=("a | b <script>alert(2)</script>", "long " * 60),
    )  # fmt: skip


def examples() -> dict[str, tuple[ReleaseReport, dict[str, bytes]]]:
    """Every state by name, with its pictures."""
    shots = pictures()
    return {
        "promoted": (promoted(), shots), "first": (first_release(), shots), "gated": (gated(), shots),
        "rolled-back": (rolled_back(), shots), "failing": (rolled_back("failing"), shots),
        "wrong": (rolled_back("wrong"), shots), "failed": (failed_in_training(), {}), "dry-run": (dry_run(), {}),
        "many-classes": (many_classes(), {}),
    }  # fmt: skip


def main(folder: Path) -> None:
    """Write every example into `folder`."""
    from tasks.report.render import render_html
    from tasks.report.tables import render_markdown_card

    folder.mkdir(parents=True, exist_ok=True)
    for name, (report, shots) in examples().items():
        (folder / f"{name}.html").write_text(render_html(report, shots), encoding="utf-8")
        (folder / f"{name}.md").write_text(render_markdown_card(report), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
