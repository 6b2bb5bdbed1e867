"""What a release leaves for people: one HTML report in the object store, and cards, tables and pictures in Prefect."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import KhetError
from configs.settings import home
from ml.bundle import Manifest
from tasks.prefect_support import show_link, show_markdown, show_picture, show_table
from tasks.report import views
from tasks.report.evidence import course
from tasks.report.model import (
    CanaryLook,
    FileLine,
    ReleaseReport,
    Severity,
    StageLine,
    TimelineEvent,
    VerdictView,
    VersionCounters,
)
from tasks.report.pictures import evidence_png, timeline_png
from tasks.report.render import render_html
from tasks.report.tables import gate_table, looks_table, markdown_image, render_markdown_card, stage_table
from tasks.rollout.journal import PREFIX, ReleaseRecord
from tasks.rollout.looks import last_verdict

if TYPE_CHECKING:
    from flows.candidate import Candidate
    from flows.session import ReleaseSession

LINK_DAYS = 7  # the longest a presigned address may live (S3 signature version 4)
_SEVERITY: dict[str, Severity] = {"info": "info", "warning": "warning", "error": "bad"}


def report_file(release_id: str) -> Path:
    """Where the report lies on this machine."""
    return home() / "reports" / f"{release_id}.html"


def report_key(release_id: str) -> str:
    """Where the report lies in the models bucket."""
    return f"{PREFIX}{release_id}/report.html"


def publish_report(session: ReleaseSession, candidate: Candidate | None) -> Path:
    """Render the report, store it, and show its parts in the Prefect UI."""
    report = build_report(session, candidate)
    pictures = _pictures(candidate)
    html = render_html(report, pictures)
    file = report_file(session.id)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(html, encoding="utf-8")
    store, bucket, key = session.systems.store, session.systems.bucket, report_key(session.id)
    store.put(bucket, key, html.encode(), content_type="text/html; charset=utf-8")
    drawn = _drawings(report)
    _show(report, store.presigned_get(bucket, key, LINK_DAYS * 86400), drawn)
    for name, (title, png) in drawn.items():
        _show_drawing(session, name, title, png)
    return file


def _drawings(report: ReleaseReport) -> dict[str, tuple[str, bytes]]:
    """Titles and pictures of the canary by their file names; none where nothing was tried on traffic."""
    if not report.looks:
        return {}
    drawn = {"timeline": ("Canary: traffic, errors and latency", timeline_png(report.looks))}
    if found := course(report.looks, report.canary.gates if report.canary else ()):
        drawn["evidence"] = ("Canary: evidence for harm", evidence_png(found))
    return drawn


def _show_drawing(session: ReleaseSession, name: str, title: str, png: bytes) -> None:
    store, bucket, key = session.systems.store, session.systems.bucket, f"{PREFIX}{session.id}/{name}.png"
    store.put(bucket, key, png, content_type="image/png")
    address = store.presigned_get(bucket, key, LINK_DAYS * 86400)
    show_picture(f"{name}-{session.id}", address, title)


def _show(report: ReleaseReport, address: str, drawn: dict[str, tuple[str, bytes]]) -> None:
    run = report.release_id
    images = [markdown_image(png, title) for title, png in drawn.values()]
    show_markdown(f"release-{run}", render_markdown_card(report, images), report.title)
    show_table(f"stages-{run}", [dict(row) for row in stage_table(report)], "Stages and their durations")
    show_link(f"report-{run}", address, "Open the release report", f"The whole report; valid for {LINK_DAYS} days")
    if rows := gate_table(report):
        show_table(f"gates-{run}", [dict(row) for row in rows], "Gates, evidence and thresholds")
    if report.looks:
        show_table(f"looks-{run}", [dict(row) for row in looks_table(report)], "Looks at the canary")


def build_report(session: ReleaseSession, candidate: Candidate | None) -> ReleaseReport:
    """Everything that is known of the release, as one record."""
    record = session.record
    manifest = _manifest(session, candidate)
    return ReleaseReport(
        release_id=record.release_id,
        title=f"Release {record.version or record.release_id}",
        version=record.version,
        champion_version=record.champion,
        outcome="failed" if record.outcome == "running" else record.outcome,
        reasons=record.reasons,
        started_at=record.started_at,
        finished_at=record.finished_at or record.started_at,
        requested_by=record.requested_by,
        stages=tuple(StageLine(**stage.model_dump()) for stage in record.stages),
        train=candidate.trained if candidate else None,
        export=candidate.exported if candidate else None,
        evaluation=candidate.evaluation if candidate else None,
        champion_evaluation=candidate.champion_evaluation if candidate else None,
        gate=views.holdout_view(candidate.gate) if candidate else None,
        canary=live_view(record),
        looks=tuple(_look(look, record) for look in record.looks),
        events=tuple(TimelineEvent(at=e.at, text=e.text, severity=_SEVERITY[e.severity]) for e in record.events),
        lineage=manifest.lineage.model_dump(mode="json", exclude={"config"}) if manifest else {},
        config=candidate.config.model_dump(mode="json") if candidate else {},
        files=tuple(
            FileLine(name=name, sha256=entry.sha256, size_bytes=entry.size_bytes)
            for name, entry in (manifest.files.items() if manifest else ())
        ),
        links=_links(session),
    )


def _links(session: ReleaseSession) -> dict[str, str]:
    bucket = session.systems.bucket
    links = {"Record and report": f"s3://{bucket}/{PREFIX}{session.id}/"}
    if session.record.version:
        links["Model files"] = f"s3://{bucket}/{session.record.version}/"
    if gateway := session.systems.settings.cluster.gateway_url:
        links["Service"] = gateway
    return links


def _manifest(session: ReleaseSession, candidate: Candidate | None) -> Manifest | None:
    if candidate is None or candidate.version is None:
        return None
    try:
        return session.systems.registry.manifest(candidate.version)
    except KhetError as error:
        session.say(f"the report goes without lineage: {error}", "warning")
        return None


def _look(look: dict[str, Any], record: ReleaseRecord) -> CanaryLook:
    return CanaryLook(
        at=datetime.fromisoformat(look["at"]),
        step=look["step"],
        weight=look["weight"],
        evidence=views.evidence_by_gate(look.get("evidence", {})),
        log_threshold=look.get("log_threshold"),
        challenger=_counters(record.version or "?", look["canary"]),
        champion=_counters(record.champion, look["champion"]) if record.champion else None,
        decision=look["decision"],
        reasons=tuple(look["reasons"]),
    )


def _counters(version: str, seen: dict[str, Any]) -> VersionCounters:
    return VersionCounters(
        version=version, **{name: seen[name] for name in VersionCounters.model_fields if name in seen}
    )


def live_view(record: ReleaseRecord) -> VerdictView | None:
    """The last verdict on live traffic, as people read it."""
    verdict = last_verdict(record.looks)
    return views.traffic_view(verdict) if verdict else None


def _pictures(candidate: Candidate | None) -> dict[str, bytes]:
    if candidate is None:
        return {}
    folders = (candidate.folder, candidate.folder.parent / "evaluation", candidate.folder.parent / "train")
    pictures: dict[str, bytes] = {}
    for folder in folders:
        for file in sorted(folder.rglob("*.png")) if folder.is_dir() else ():
            pictures.setdefault(str(file.relative_to(folder)), file.read_bytes())
    return pictures
