"""`khet canary plan`: what a rollout would see, before there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from configs.areas import CanarySettings, HarmSettings
from configs.base import validate
from configs.errors import ConfigError
from configs.settings import Settings, load_settings
from flows.planning import MEASURE_S, expected_traffic, measured_rate
from flows.terminal import err, out, print_json, print_table
from tasks.cluster import cluster
from tasks.rollout.planner import Forecast, GateForecast, forecast, sentences, shown, smallest_seen
from tasks.rollout.procedure import step_label, wants_baseline
from tasks.rollout.supply import Setup, Traffic

_MARKS = {"seen": "[green]✓[/]", "missed": "[yellow]![/]", "cannot": "[red]✗[/]", "silent": "[dim]–[/]"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says; None and empty leave a setting as it is. Rates are requests a second."""

    rate: float | None = None
    labelled_rate: float | None = None
    error_rate: float | None = None
    usual: Sequence[str] = ()
    harm: Sequence[str] = ()
    steps: str | None = None
    min_samples: int | None = None
    shadow_requests: int | None = None
    deadline_s: int | None = None
    classes: int = 8
    baseline: bool | None = None


def plan(asked: Asked, *, as_json: bool) -> bool:
    """Show the plan; returns whether the rollout can decide.

    Raises:
        ConfigError: an option makes no sense, or the traffic is not known.
        ExternalError: the running cluster does not answer.
    """
    current = load_settings()
    canary, harms = _canary(current.canary, asked), _harms(current.harms, asked)
    baseline = _baseline(current, canary, asked)
    traffic = _traffic(current, asked, quiet=as_json)
    setup = Setup(canary, current.judge, harms, traffic, classes=asked.classes, baseline=baseline)
    found = forecast(setup)
    if as_json:
        print_json(_to_json(found))
    else:
        _show(found)
    return found.decides


def _canary(settings: CanarySettings, asked: Asked) -> CanarySettings:
    changes: dict[str, Any] = {
        "min_samples": asked.min_samples,
        "shadow_requests": asked.shadow_requests,
        "deadline_s": asked.deadline_s,
        "steps": asked.steps.split(",") if asked.steps is not None else None,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return validate(CanarySettings, settings.model_dump() | given, source="command line")


def _harms(settings: HarmSettings, asked: Asked) -> HarmSettings:
    values = settings.model_dump()
    usual = [*asked.usual] if asked.error_rate is None else [f"errors={asked.error_rate}", *asked.usual]
    for field, pairs in (("usual", usual), ("harm", asked.harm)):
        for name, value in map(_pair, pairs):
            if name not in values:
                raise ConfigError(f"--{field} {name}: no such harm. Known: {', '.join(values)}.")
            values[name][field] = value
    return validate(HarmSettings, values, source="command line")


def _pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise ConfigError(f"{text}: expected NAME=RATE, such as errors=0.02.")
    return name.strip(), value.strip()


def _baseline(current: Settings, canary: CanarySettings, asked: Asked) -> bool:
    """Whether the champion would run once more. Without a cluster to ask, `auto` takes it that there is room."""
    if asked.baseline is not None:
        return asked.baseline
    nodes = current.cluster
    if nodes.node_url is None:
        return canary.baseline == "on" or (canary.baseline == "auto" and nodes.replicas > nodes.canary_replicas)
    return wants_baseline(cluster(current), canary, replicas=nodes.replicas, canary=nodes.canary_replicas)


def _traffic(current: Settings, asked: Asked, *, quiet: bool) -> Traffic:
    """As the command line says, or as the gateway sees it now and the replayer will add."""
    if asked.rate is None:
        return _measured(current, asked, quiet=quiet)
    replay = current.replay
    labelled = asked.labelled_rate
    if labelled is None:
        labelled = min(asked.rate, replay.rate_per_s) if replay.enabled else 0.0
    if asked.rate <= 0 or not 0 <= labelled <= asked.rate:
        raise ConfigError(f"--rate {asked.rate:g}, --labelled-rate {labelled:g}: the second is part of the first.")
    return Traffic(asked.rate, labelled, replay.max_images)


def _measured(current: Settings, asked: Asked, *, quiet: bool) -> Traffic:
    if asked.labelled_rate is not None:
        raise ConfigError("--labelled-rate is part of --rate: give both.")
    if current.cluster.node_url is None:
        raise ConfigError("No stack is running whose traffic could be measured. Next: give --rate, or `khet up`.")
    if not quiet:
        err.print(f"measuring the gateway's traffic for {MEASURE_S:g} s")
    traffic = expected_traffic(current, measured_rate(cluster(current), MEASURE_S))
    if traffic is None:
        raise ConfigError("No requests arrive at the gateway and none are replayed. Next: give --rate.")
    return traffic


def _show(found: Forecast) -> None:
    setup = found.setup
    beside = "a baseline as large as the canary" if setup.baseline else "the whole stable track"
    traffic = setup.traffic
    out.print(
        f"{traffic.requests_per_s:g} requests/s, {traffic.labelled_per_s:g} of them labelled; compared with {beside}. "
        f"A healthy rollout takes {_minutes(found.minutes)}."
    )
    out.print("Needed: samples with which half and 90% of the rollouts see the harm. Time for 90%: along the steps,")
    out.print("and at each step's share alone. Seen: before this rollout ends; instead: the harm that it does see.\n")
    print_table("", _columns(found), [_row(gate, setup) for gate in found.gates])
    out.print()
    for sentence in sentences(found):
        out.print(f"[yellow]![/] {sentence}")
    _show_recommendation(found)


def _columns(found: Forecast) -> list[str]:
    weights = " / ".join(step_label(step) for step in found.setup.canary.steps)
    return ["", "gate", "harm", "needed 50% / 90%", "there are", "time", f"at {weights}", "seen", "instead"]


def _row(gate: GateForecast, setup: Setup) -> list[object]:
    larger = smallest_seen(setup, gate) if gate.state in ("missed", "cannot") else None
    return [
        _MARKS[gate.state],
        gate.name if gate.counts else f"{gate.name} (reports only)",
        f"{shown(gate.key, gate.usual)} → {shown(gate.key, gate.harm)}",
        f"{_count(gate.needed)} / {_count(gate.needed_90)}",
        f"{gate.available:,}",
        _minutes(gate.minutes_90),
        " / ".join(_minutes(value) for value in gate.at_step) if any(gate.at_step) else None,
        f"{gate.seen:.0%}",
        None if larger is None else shown(gate.key, larger),
    ]


def _show_recommendation(found: Forecast) -> None:
    advice, canary = found.recommended, found.setup.canary
    if advice is None:
        out.print("[red]✗[/] no steps show every harm in time. What would help:")
        for sentence in found.would_help:
            out.print(f"    {sentence}", markup=False)
        return
    if (advice.steps, advice.min_samples, advice.shadow_requests) == (
        canary.steps,
        canary.min_samples,
        canary.shadow_requests,
    ):
        out.print("[green]✓[/] these steps show every harm in 90% of the rollouts.")
        return
    steps = ", ".join(f"{step:g}" for step in advice.steps)
    out.print(
        f"[green]→[/] canary.steps: [{steps}], canary.min_samples: {advice.min_samples}, canary.shadow_requests: "
        f"{advice.shadow_requests} show every harm in 90% of the rollouts, in {_minutes(advice.minutes)}.",
        markup=True,
    )


def _count(value: int | None) -> str:
    return "never" if value is None else f"{value:,}"


def _minutes(value: float | None) -> str:
    if value is None:
        return "never"
    if value < 2:
        return f"{60 * value:.0f} s"
    return f"{value:.0f} min" if value < 120 else f"{value / 60:.0f} h"


def _to_json(found: Forecast) -> Mapping[str, Any]:
    return {
        "decides": found.decides,
        "minutes": found.minutes,
        "traffic": found.setup.traffic,
        "baseline": found.setup.baseline,
        "stages": found.stages,
        "gates": [_gate_json(gate) for gate in found.gates],
        "warnings": sentences(found),
        "recommended": found.recommended,
        "would_help": found.would_help,
    }


def _gate_json(gate: GateForecast) -> Mapping[str, Any]:
    fields = {name: getattr(gate, name) for name in GateForecast.__dataclass_fields__}
    return fields | {"state": gate.state}
