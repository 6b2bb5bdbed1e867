"""`khet versions`, `show`, `verify`, `releases` and `report`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from configs.errors import ConfigError, IntegrityError
from configs.settings import home, settings
from flows.terminal import human_bytes, out, print_json, print_table, shown_path, to_json
from ml.objects import ObjectStore
from ml.version import Version, is_version
from tasks.registry import ALIASES, Registry, VersionInfo
from tasks.report.tables import gate_rows
from tasks.report.views import traffic_view
from tasks.rollout import journal
from tasks.rollout.journal import PREFIX, ReleaseRecord
from tasks.rollout.looks import last_verdict

_WHY = 120  # characters of a reason in a table
# The whole table of gates needs this many characters; a narrower terminal gets what fits into 80 of them.
_WIDE = 115
_NARROW_COLUMNS = frozenset({"gate", "result", "value", "champion", "limit", "evidence"})


def resolve(registry: Registry, name: str) -> Version:
    """A version by its number or by an alias.

    Raises:
        ConfigError: neither.
    """
    if is_version(name):
        return Version.parse(name)
    if name not in ALIASES:
        raise ConfigError(f"{name!r} is neither a version (v1.3.0) nor an alias ({', '.join(ALIASES)}).")
    state = registry.alias(name)
    if state is None:
        raise ConfigError(f"Alias {name} points at nothing yet.")
    return state.version


def show_versions(*, as_json: bool) -> None:
    """Published versions with their scores and aliases."""
    registry = Registry.from_settings(settings())
    infos, aliases = registry.versions(), registry.aliases()
    metrics, problems = _metrics(registry, infos)
    if as_json:
        listed = [
            {
                "version": info.version,
                "published_at": info.published_at,
                "size_bytes": info.size_bytes,
                "metrics": metrics.get(info.version, {}),
                "problem": problems.get(info.version),
                "aliases": [name for name, state in aliases.items() if state.version == info.version],
            }
            for info in infos
        ]
        print_json(listed)
        return
    rows = [
        [
            info.version,
            ", ".join(name for name, state in aliases.items() if state.version == info.version),
            "does not verify" if info.version in problems else f"{metrics[info.version].get('accuracy', math.nan):.1%}",
            f"{info.published_at:%Y-%m-%d %H:%M}",
            human_bytes(info.size_bytes),
        ]
        for info in infos
    ]
    print_table("Versions", ["version", "alias", "accuracy", "published (UTC)", "size"], rows)


def _metrics(
    registry: Registry, infos: Sequence[VersionInfo]
) -> tuple[dict[Version, dict[str, float]], dict[Version, str]]:
    """Scores by version; what is wrong with those whose manifest does not verify. One bad version hides no other."""
    metrics: dict[Version, dict[str, float]] = {}
    problems: dict[Version, str] = {}
    for info in infos:
        try:
            metrics[info.version] = registry.manifest(info.version).metrics
        except IntegrityError as error:
            problems[info.version] = str(error).partition("\n")[0]
    return metrics, problems


def show_version(name: str, *, as_json: bool) -> None:
    """One version in full, with the verdict of its last rollout."""
    registry = Registry.from_settings(settings())
    manifest = registry.manifest(resolve(registry, name))
    judged = _last_rollout(manifest.version)
    if as_json:
        verdict = last_verdict(judged.looks) if judged else None
        print_json(to_json(manifest) | {"verdict": verdict.to_json() if verdict else None})
        return
    lineage = manifest.lineage
    dirty = " (with uncommitted changes)" if lineage.git_dirty else ""
    out.print(
        f"[bold]{manifest.version}[/] published {manifest.created_at:%Y-%m-%d %H:%M} UTC by {manifest.created_by}"
    )
    print_table("Scores", ["metric", "value"], [[k, f"{v:.4f}"] for k, v in sorted(manifest.metrics.items())])
    facts: list[list[object]] = [
        ["parent", lineage.parent],
        ["release", lineage.release_id],
        ["commit", f"{lineage.git_commit}{dirty}"],
        ["dataset", f"{lineage.dataset} ({lineage.dataset_hash[:12]})"],
        ["seed", lineage.seed],
        ["lock", (lineage.lock_sha256 or "–")[:12]],
        ["hardware", ", ".join(f"{k} {v}" for k, v in lineage.hardware.items())],
    ]
    print_table("Lineage", ["", ""], facts)
    if judged:
        show_verdict(judged)
    files = [[name, human_bytes(entry.size_bytes), entry.sha256[:16]] for name, entry in manifest.files.items()]
    print_table("Files", ["name", "size", "sha256"], files)


def _last_rollout(version: Version) -> ReleaseRecord | None:
    """The youngest release that judged this version on traffic."""
    store = settings().object_store
    found = journal.releases(ObjectStore(store), store.models_bucket)
    return next((r for r in reversed(found) if r.version == str(version) and r.looks), None)


def show_verdict(record: ReleaseRecord) -> None:
    """The judge's last word on it, in a sentence and as a table of gates."""
    verdict = last_verdict(record.looks)
    if verdict is None:
        return
    out.print(f"Verdict of release {record.release_id}: {verdict.sentence}", markup=False)
    rows = gate_rows(traffic_view(verdict).gates)
    if not rows:
        return
    columns = [name for name in rows[0] if out.width >= _WIDE or name in _NARROW_COLUMNS]
    print_table("Gates on traffic", columns, [[row[name] for name in columns] for row in rows])


def why(record: ReleaseRecord) -> str:
    """The judge's sentence where it decided, the recorded reasons elsewhere; short enough for a table."""
    verdict = last_verdict(record.looks) if record.outcome in {"promoted", "rolled_back"} else None
    return textwrap.shorten(verdict.sentence if verdict else "; ".join(record.reasons), _WHY, placeholder=" …")


def verify_version(name: str, *, as_json: bool) -> bool:
    """Check every file; returns whether all are right."""
    registry = Registry.from_settings(settings())
    report = registry.verify(resolve(registry, name))
    if as_json:
        print_json({"version": report.version, "ok": report.ok, "problems": report.problems, "files": report.files})
        return report.ok
    for check in report.files:
        mark = "[red]✗[/]" if check.problem else "[green]✓[/]"
        out.print(f"{mark} {check.name:<40} {check.problem or human_bytes(check.size_bytes)}")
    verdict = (
        "verifies, signed by " + str(report.signed_by)
        if report.ok
        else "does NOT verify: " + "; ".join(report.problems)
    )
    out.print(f"{report.version} {verdict}", markup=False)
    return report.ok


def show_releases(*, as_json: bool) -> None:
    """Releases and rollbacks."""
    current = settings()
    found = journal.releases(ObjectStore(current.object_store), current.object_store.models_bucket)
    if as_json:
        print_json(found)
        return
    rows = [
        [
            r.release_id,
            r.kind,
            f"{r.outcome}: {r.stage}" if r.stage else r.outcome,
            r.version,
            f"{r.started_at:%Y-%m-%d %H:%M}",
            r.requested_by,
            why(r),
        ]
        for r in found
    ]
    print_table("Releases", ["id", "kind", "outcome", "version", "started (UTC)", "by", "why"], rows)


def fetch_report(release_id: str | None) -> None:
    """Bring a report here and say where it is."""
    current = settings()
    store, bucket = ObjectStore(current.object_store), current.object_store.models_bucket
    if release_id is None:
        done = [r for r in journal.releases(store, bucket) if r.kind == "release" and r.finished_at]
        if not done:
            raise ConfigError("There is no finished release yet. `khet release` makes one.")
        release_id = done[-1].release_id
    journal.key(release_id)
    target = home() / "reports" / f"{release_id}.html"
    store.get_file(bucket, f"{PREFIX}{release_id}/report.html", target)
    out.print(shown_path(target))
