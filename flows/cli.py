"""`khet`, the terminal's door to the flows. Heavy imports happen inside the commands: `--help` answers at once.

Exit codes: 0 done; 1 other error; 2 configuration or usage; 3 a gate, judge or person said no; 4 integrity; 5 a system
did not answer; 6 a guard stopped it; 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from configs.errors import KhetError

app = typer.Typer(
    name="khet",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Release, watch and roll back leaf-disease models. Start with [bold]khet up[/], then [bold]khet release[/].",
)
data_app = typer.Typer(no_args_is_help=True, help="Import and list training data.")
app.add_typer(data_app, name="data")
canary_app = typer.Typer(no_args_is_help=True, help="What a canary can see.")
app.add_typer(canary_app, name="canary")
cluster_app = typer.Typer(no_args_is_help=True, help="The Kubernetes cluster that replicas run on.")
app.add_typer(cluster_app, name="cluster")
feedback_app = typer.Typer(no_args_is_help=True, help="Labels that people give predictions afterwards.")
app.add_typer(feedback_app, name="feedback")

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, change nothing.")]


@app.command()
def up(
    wait_for: Annotated[
        list[str] | None,
        typer.Option("--wait-for", help="Return when this part is healthy (repeatable); the others go on starting."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option("--listen", help="Address of this machine that pods reach the stack at, or loopback; kept."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="What replicas are: local-node or kubernetes; kept.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start the local stack and wait until it is healthy.

    Example: khet up
    """
    from configs.settings import load_settings
    from deployments import local
    from flows.commands import stack

    local.choose(listen=listen, backend=backend)
    with stack.live(quiet=as_json) as on_event:
        state = local.up(load_settings(), on_event=on_event, wait_for=wait_for)
    stack.show(state, as_json=as_json)


@app.command()
def down(as_json: Json = False) -> None:
    """Stop the local stack. Data, versions and credentials stay.

    Example: khet down
    """
    from deployments import local
    from flows.commands import stack

    with stack.live(quiet=as_json) as on_event:
        local.down(on_event=on_event)
    if as_json:
        stack.show(local.status(), as_json=True)


@app.command()
def status(as_json: Json = False) -> None:
    """Show what runs where, which version serves, and how the traffic is split.

    Example: khet status --json
    """
    from flows.commands import stack

    stack.show_status(as_json=as_json)


@app.command()
def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Finish or undo interrupted releases.")] = False,
    as_json: Json = False,
) -> None:
    """Check that everything is reachable, and find releases that were interrupted.

    Example: khet doctor --fix
    """
    from flows.commands import health

    health.run(fix=fix, as_json=as_json)


@cluster_app.command("init")
def cluster_init(
    overlay: Annotated[
        str | None, typer.Option("--overlay", help="Environment of deployments/kubernetes/overlays. Empty: by profile.")
    ] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", help="Namespace; kept.")] = None,
    context: Annotated[str | None, typer.Option("--context", help="Context of the kubeconfig; kept.")] = None,
    kubeconfig: Annotated[str | None, typer.Option("--kubeconfig", help="Instead of kubectl's own; kept.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="Serving image instead of the overlay's.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make what people own in a cluster: accounts, roles, policies, settings, Secrets; then check it like the doctor.

    Example: khet cluster init --context kind-kind --dry-run
    """
    from flows.commands import cluster

    given = {"namespace": namespace, "context": context, "kubeconfig": kubeconfig, "image": image}
    cluster.init(given, overlay, dry_run=dry_run, as_json=as_json)


@app.command()
def deploy() -> None:
    """Register the flows with the Prefect server: forms, schedules, concurrency limits.

    Example: khet deploy
    """
    from flows.commands import deploying
    from flows.terminal import out

    for name in deploying.deploy():
        out.print(f"deployed {name}")


@data_app.command("import")
def data_import(
    source: Annotated[str, typer.Argument(help="A folder with one folder per class, or s3://bucket/prefix.")],
    name: Annotated[str, typer.Option("--name", help="Name of the dataset.")],
    as_json: Json = False,
) -> None:
    """Import photos: check every file, split them, and store them as a dataset.

    Example: khet data import photos/ --name orchard
    """
    from flows.commands import datasets

    datasets.import_source(source, name, as_json=as_json)


@data_app.command("sample")
def data_sample(
    name: Annotated[str, typer.Option("--name", help="Name of the dataset.")] = "leaves",
    count: Annotated[int | None, typer.Option("--count", min=80, help="Photos to generate.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the generator.")] = 0,
    as_json: Json = False,
) -> None:
    """Generate leaf photos of eight classes and import them.

    Example: khet data sample --name leaves --count 4000
    """
    from flows.commands import datasets

    datasets.sample(name, count, seed, as_json=as_json)


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="Name of an imported dataset.")], as_json: Json = False
) -> None:
    """Bring a dataset from the object store to this machine, every byte checked.

    Example: khet data fetch leaves
    """
    from flows.commands import datasets

    datasets.fetch(name, as_json=as_json)


@data_app.command("list")
def data_list(as_json: Json = False) -> None:
    """List imported datasets.

    Example: khet data list
    """
    from flows.commands import datasets

    datasets.show_list(as_json=as_json)


@app.command()
def release(
    config: Annotated[str, typer.Option("--config", help="Training configuration.")] = (
        "configs/training/plant_disease.yaml"
    ),
    data: Annotated[
        str | None, typer.Option("--data", help="Dataset to train on instead of the configuration's.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="Roll out this published version instead of training.")
    ] = None,
    dry_run: DryRun = False,
    resume: Annotated[str | None, typer.Option("--resume", help="Go on with an interrupted release.")] = None,
    ask: Annotated[bool, typer.Option("--ask/--auto-promote", help="Wait for a person before promoting.")] = False,
    as_json: Json = False,
) -> None:
    """Train, export, publish, try on a share of the traffic, promote; or stop where it is not good enough.

    Example: khet release --data leaves --ask
    """
    from flows.commands import running

    running.release(
        {"config": config, "data": data, "version": version, "dry_run": dry_run, "resume": resume, "ask": ask},
        as_json=as_json,
    )


@app.command()
def train(
    config: Annotated[str, typer.Option("--config", help="Training configuration.")] = (
        "configs/training/plant_disease.yaml"
    ),
    data: Annotated[
        str | None, typer.Option("--data", help="Dataset to train on instead of the configuration's.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", help="Go on with the training of this id, or fetch what it made.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train and store a model without releasing it.

    Example: khet train --config configs/training/smoke.yaml --data leaves
    """
    from flows.commands import running

    running.train({"config": config, "data": data, "resume": resume, "dry_run": dry_run}, as_json=as_json)


@canary_app.command("plan")
def canary_plan(
    rate: Annotated[
        float | None, typer.Option("--rate", help="Requests/s at the gateway. Empty: measured, where a stack runs.")
    ] = None,
    labelled_rate: Annotated[
        float | None, typer.Option("--labelled-rate", help="Those of them that are labelled photos. Empty: replay.*")
    ] = None,
    error_rate: Annotated[
        float | None, typer.Option("--error-rate", help="Usual share of errors; short for --usual errors=…")
    ] = None,
    usual: Annotated[
        list[str] | None, typer.Option("--usual", help="NAME=RATE as it usually is (repeatable; names: harms.*).")
    ] = None,
    harm: Annotated[
        list[str] | None, typer.Option("--harm", help="NAME=RATE that has to be seen (repeatable; names: harms.*).")
    ] = None,
    steps: Annotated[str | None, typer.Option("--steps", help="Shares of traffic: 0.05,0.25,0.5")] = None,
    min_samples: Annotated[int | None, typer.Option("--min-samples", help="Canary requests a step.")] = None,
    shadow_requests: Annotated[int | None, typer.Option("--shadow-requests", help="Mirrored requests.")] = None,
    deadline: Annotated[int | None, typer.Option("--deadline", help="Seconds a step may take.")] = None,
    classes: Annotated[int, typer.Option("--classes", min=0, help="Classes both versions know; 0: others.")] = 8,
    baseline: Annotated[
        bool | None, typer.Option("--baseline/--no-baseline", help="Compare with a track as large as the canary.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what each gate needs to see a stated harm, and which steps would see it. Exits 3 when they cannot decide.

    Example: khet canary plan --rate 80 --harm errors=0.02
    """
    from flows.commands import canary

    asked = canary.Asked(
        rate=rate,
        labelled_rate=labelled_rate,
        error_rate=error_rate,
        usual=usual or (),
        harm=harm or (),
        steps=steps,
        min_samples=min_samples,
        shadow_requests=shadow_requests,
        deadline_s=deadline,
        classes=classes,
        baseline=baseline,
    )
    if not canary.plan(asked, as_json=as_json):
        raise typer.Exit(3)


@app.command()
def rollback(
    to: Annotated[str, typer.Option("--to", help="Version to return to.")] = "previous",
    dry_run: DryRun = False,
    force: Annotated[bool, typer.Option("--force", help="Take over from a run that is changing the cluster.")] = False,
    history: Annotated[
        bool, typer.Option("--history", help="List the versions that served, by whom and why, and change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Return all traffic to a version that served before, and verify it. Works while the object store is down.

    Example: khet rollback --to v1.2.0
    """
    from flows.commands import rollbacks

    if history:
        rollbacks.show_history(as_json=as_json)
        return
    rollbacks.rollback({"to": to, "dry_run": dry_run, "force": force}, as_json=as_json)


@app.command("rolling-update")
def rolling_update(
    version: Annotated[
        str | None, typer.Option("--version", help="Model version. Empty: the one that is served.")
    ] = None,
    image: Annotated[str | None, typer.Option("--image", help="Serving image (Kubernetes). Empty: as it is.")] = None,
    surge: Annotated[int, typer.Option("--surge", min=0, help="Replicas beyond the wanted number.")] = 1,
    unavailable: Annotated[int, typer.Option("--unavailable", min=0, help="Replicas that may be missing.")] = 0,
    deadline: Annotated[
        float | None, typer.Option("--deadline", help="Seconds without progress after which it is undone.")
    ] = None,
    unjudged: Annotated[
        bool, typer.Option("--unjudged", help="Allow a version that was never judged on traffic.")
    ] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Replace every replica by another model version or image; undo it where the new ones do not become ready.

    Example: khet rolling-update --version v1.3.0 --dry-run
    """
    from flows.commands import procedures

    asked = {"version": version, "image": image, "surge": surge, "unavailable": unavailable, "deadline_s": deadline}
    procedures.run("rolling_update", {**asked, "unjudged": unjudged, "dry_run": dry_run}, as_json=as_json)


@app.command("blue-green")
def blue_green(
    version: Annotated[str | None, typer.Option("--version", help="Published version that becomes green.")] = None,
    watch: Annotated[float | None, typer.Option("--watch", help="Seconds that blue is kept ready.")] = None,
    back: Annotated[bool, typer.Option("--back", help="Return to blue now, while green is watched.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Bring a version up beside the one that serves, verify it, and switch all traffic at once.

    Example: khet blue-green --version v1.3.0 --watch 600
    """
    from flows.commands import procedures

    asked = {"version": version, "watch_s": watch, "back": back, "dry_run": dry_run}
    procedures.run("blue_green", asked, as_json=as_json)


@app.command("ab-test")
def ab_test(
    version: Annotated[str | None, typer.Option("--version", help="Published version that becomes B.")] = None,
    share: Annotated[float | None, typer.Option("--share", help="Share of the users that meet B, up to 0.5.")] = None,
    duration: Annotated[float | None, typer.Option("--duration", help="Seconds that the test runs.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Serve two versions to different users, each user always the same one, and say what differs.

    Example: khet ab-test --version v1.3.0 --share 0.2 --duration 86400
    """
    from flows.commands import procedures

    asked = {"version": version, "share": share, "duration_s": duration, "dry_run": dry_run}
    procedures.run("ab_test", asked, as_json=as_json)


@app.command()
def scale(
    replicas: Annotated[int, typer.Argument(min=1, help="How many replicas.")],
    track: Annotated[str, typer.Option("--track", help="stable is production.")] = "stable",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run this many replicas; also while a release is running.

    Example: khet scale 5
    """
    from flows.commands import procedures

    procedures.run("scale", {"replicas": replicas, "track": track, "dry_run": dry_run}, as_json=as_json)


@app.command()
def restart(
    track: Annotated[str, typer.Option("--track", help="stable is production.")] = "stable",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Replace every replica by a new one of the same version, without a gap.

    Example: khet restart
    """
    from flows.commands import procedures

    procedures.run("restart", {"track": track, "dry_run": dry_run}, as_json=as_json)


@app.command()
def watchdog(dry_run: DryRun = False, as_json: Json = False) -> None:
    """Look once for rollouts that were left half done, and finish or undo them.

    Example: khet watchdog --dry-run
    """
    from flows.commands import procedures

    procedures.watch({"dry_run": dry_run}, as_json=as_json)


@app.command()
def review(
    act: Annotated[bool, typer.Option("--act", help="Roll back at once where harm is shown.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the verdict; write nothing, change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Judge the version in production by the labels that came since its promotion. Exits 3 where they show harm.

    Example: khet review --dry-run
    """
    from flows.commands import reviewing

    reviewing.review({"act": act, "dry_run": dry_run}, as_json=as_json)


@feedback_app.command("add")
def feedback_add(
    file: Annotated[
        Path, typer.Argument(help="CSV: request_id,label,source and, where they are known, received_at, version, ...")
    ],
    correct: Annotated[bool, typer.Option("--correct", help="Replace labels the same source gave before.")] = False,
    as_json: Json = False,
) -> None:
    """Store labels of past predictions; answers that the file does not name are looked up in the inference log.

    Example: khet feedback add labels.csv
    """
    from flows.commands import reviewing

    reviewing.add(file, correct=correct, as_json=as_json)


@app.command()
def approve(
    release_id: Annotated[str | None, typer.Argument(help="Release that waits. Empty: the only one that does.")] = None,
    no: Annotated[bool, typer.Option("--no", help="Decline instead.")] = False,
    comment: Annotated[str, typer.Option("--comment", help="Why; kept in the record.")] = "",
) -> None:
    """Answer a release that waits for a person (khet release --ask).

    Example: khet approve 4f0c2d9a1b --comment "looks good"
    """
    from flows.commands import running

    running.approve(release_id, approve=not no, comment=comment)


@app.command()
def releases(as_json: Json = False) -> None:
    """List releases and rollbacks, newest last.

    Example: khet releases
    """
    from flows.commands import catalogue

    catalogue.show_releases(as_json=as_json)


@app.command()
def versions(as_json: Json = False) -> None:
    """List published versions and where the aliases point.

    Example: khet versions
    """
    from flows.commands import catalogue

    catalogue.show_versions(as_json=as_json)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="A version such as v1.3.0, or an alias.")], as_json: Json = False
) -> None:
    """Show one version: its scores, files and lineage.

    Example: khet show production
    """
    from flows.commands import catalogue

    catalogue.show_version(version, as_json=as_json)


@app.command()
def verify(
    version: Annotated[str, typer.Argument(help="A version such as v1.3.0, or an alias.")], as_json: Json = False
) -> None:
    """Compare every stored file of a version with its signed manifest.

    Example: khet verify v1.3.0
    """
    from flows.commands import catalogue

    if not catalogue.verify_version(version, as_json=as_json):
        raise typer.Exit(4)


@app.command()
def report(release_id: Annotated[str | None, typer.Argument(help="A release. Empty: the last one.")] = None) -> None:
    """Fetch the report of a release and print where it lies.

    Example: khet report
    """
    from flows.commands import catalogue

    catalogue.fetch_report(release_id)


@app.command()
def predict(
    photos: Annotated[list[Path], typer.Argument(help="Photos of leaves.", exists=True, dir_okay=False)],
    as_json: Json = False,
) -> None:
    """Ask the running service what is on a photo.

    Example: khet predict leaf.jpg
    """
    from flows.commands import predicting

    predicting.predict(photos, as_json=as_json)


def main() -> None:
    """Entry point: run a command, and turn errors into messages and exit codes."""
    try:
        app()
    except KhetError as error:
        _fail(error, as_json="--json" in sys.argv)


def _fail(error: KhetError, *, as_json: bool) -> NoReturn:
    from flows.terminal import print_error

    print_error(error, as_json=as_json)
    sys.exit(error.exit_code)
