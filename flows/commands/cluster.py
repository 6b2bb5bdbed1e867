"""`khet cluster init`: prepare a Kubernetes cluster for the flows, and this machine for that cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import settings as configured
from configs.errors import ExternalError, KhetError
from configs.settings import Settings, home, load_settings
from deployments.local.files import Layout
from deployments.local.site import remember
from flows.commands import deploying, health
from flows.terminal import err, out, print_json
from tasks.audit import actor, audit
from tasks.cluster.kubernetes.client import Kube, pinned


def init(given: dict[str, str | None], overlay: str | None, *, dry_run: bool, as_json: bool) -> None:
    """Apply an overlay, filled in from the settings, and check the cluster as `khet doctor` does.

    Where Prefect runs on this machine, the flows are registered there as well: nothing in a cluster ends a lost canary,
    the watchdog does.

    `given` holds namespace, context, kubeconfig and image as they were typed. File and context are kept in the settings
    file, also those that nobody typed: a worker has another environment, and kubectl's context changes.

    Raises:
        ConfigError: the settings or the overlay cannot be used there. Nothing was changed.
        SafetyError: somebody else owns a field; what was applied before stays.
        ExternalError: the cluster did not answer, or a check failed afterwards.
    """
    from deployments.kubernetes import setup

    settings = _for_cluster(load_settings(), given)
    area = settings.cluster.kubernetes
    kube = Kube.connect(area, settings.cluster.call_timeout_s).written_by(setup.MANAGER)
    plan = setup.plan_setup(settings, kube, overlay or setup.default_overlay(), given["image"])
    if dry_run:
        _show_plan(plan, as_json=as_json)
        return
    _apply(settings, kube, plan)
    url = settings.cluster.gateway_url or setup.address(kube, settings)
    remember(Layout(home()), {"cluster": {**plan.cluster, "gateway_url": url}})
    configured.settings.cache_clear()
    current = load_settings()
    if current.stack.orchestrator == "embedded":
        err.print("registering the flows with Prefect")
        deploying.deploy()  # its watchdog is what ends a lost canary in a cluster
    checks = health.cluster_checks(current)
    if as_json:
        print_json({**_summary(plan), "gateway_url": url, "checks": checks})
    else:
        _show_done(plan, url)
        health.show(checks)
    if bad := [check["name"] for check in checks if not check["ok"]]:
        raise ExternalError(f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}.", retryable=False)


def _for_cluster(settings: Settings, given: dict[str, str | None]) -> Settings:
    typed: dict[str, Any] = {name: value for name, value in given.items() if value is not None and name != "image"}
    if "kubeconfig" in typed:
        typed["kubeconfig"] = Path(typed["kubeconfig"]).resolve()
    kubernetes = pinned(settings.cluster.kubernetes.model_copy(update=typed))
    cluster = settings.cluster.model_copy(update={"backend": "kubernetes", "kubernetes": kubernetes})
    return settings.model_copy(update={"cluster": cluster})


def _apply(settings: Settings, kube: Kube, plan: Any) -> None:
    from deployments.kubernetes import setup

    log, subject = audit(settings), f"namespace {kube.namespace} of {kube.host}"
    recorded = {"changes": [change.name for change in plan.changes], "cluster": plan.cluster}
    log.record(actor(), "cluster init", subject, recorded, "intended")
    try:
        setup.apply(kube, plan.changes)
    except KhetError as error:
        log.record(actor(), "cluster init", subject, recorded, "failed", str(error).splitlines()[0])
        raise
    log.record(actor(), "cluster init", subject, recorded, "done")


def _summary(plan: Any) -> dict[str, Any]:
    changed = [change.name for change in plan.changes]
    return {
        "changed": changed, "unchanged": plan.unchanged, "not_served": plan.unserved, "left_out": plan.left_out,
        "missing_secrets": plan.missing,
    }  # fmt: skip


def _show_plan(plan: Any, *, as_json: bool) -> None:
    if as_json:
        print_json({**_summary(plan), "diff": {change.name: change.diff for change in plan.changes}})
        return
    for change in plan.changes:
        out.print(change.diff, markup=False, soft_wrap=True)
    _show_rest(plan)
    out.print(f"Dry run: {len(plan.changes)} objects would change, {len(plan.unchanged)} are as they should be.")


def _show_done(plan: Any, url: str | None) -> None:
    for change in plan.changes:
        out.print(f"applied {change.name}", markup=False)
    _show_rest(plan)
    out.print(f"{len(plan.changes)} objects were applied, {len(plan.unchanged)} were as they should be.")
    out.print(f"Predictions  {url}/predict" if url else "The users' Service has no address of its own.")


def _show_rest(plan: Any) -> None:
    if plan.unserved:
        err.print(f"This cluster does not serve {', '.join(plan.unserved)}: left out.", markup=False)
    if plan.left_out:
        err.print(f"Prefect runs on this machine: left out {', '.join(plan.left_out)}.", markup=False)
    for name in plan.missing:
        err.print(
            f"Secret {name} is yours to make, as deployments/kubernetes/base/kustomization.yaml says.", markup=False
        )
