"""Counters of tracks from what every pod counts by itself. Restarts and new pods lose nothing that was once read."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import httpx

from configs.errors import ExternalError
from tasks.cluster import Track, TrackCounters
from tasks.cluster.exposition import read_replica
from tasks.cluster.kubernetes.client import POD, Kube, NotFoundError, Object
from tasks.cluster.kubernetes.objects import PORT, TRACK
from tasks.cluster.meter import Meter

Fetch = Callable[[Object], str]  # a pod's /metrics; ExternalError without
_AT_ONCE: Final = 8


def through_api_server(kube: Kube) -> Fetch:
    """Works from everywhere, needs the permission to get pods/proxy."""

    def fetch(pod: Object) -> str:
        try:
            return kube.text(POD, f"{pod['metadata']['name']}:{PORT}", "proxy/metrics")
        except NotFoundError as error:
            raise ExternalError(f"{pod['metadata']['name']} has ended meanwhile: {error}") from error

    return fetch


def from_pods(timeout_s: float) -> Fetch:
    """Works inside the cluster, without a word to the API server."""
    client = httpx.Client(timeout=timeout_s)

    def fetch(pod: Object) -> str:
        try:
            return client.get(f"{address(pod)}/metrics").raise_for_status().text
        except httpx.HTTPError as error:
            raise ExternalError(f"{pod['metadata']['name']} does not tell its metrics: {error}") from error

    return fetch


def address(pod: Object) -> str:
    """Base URL of a pod; empty until it has an address."""
    found = (pod.get("status") or {}).get("podIP")
    return f"http://{url_host(found)}:{PORT}" if found else ""


def url_host(found: str) -> str:
    """An IP address as a URL has it."""
    return f"[{found}]" if ipaddress.ip_address(found).version == 6 else found


class Counting:
    """Totals since the first look, by track. Each pod is a source of its own; a container that starts anew begins
    anew, which its start time tells."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._meters: dict[Track, tuple[str, Meter]] = {}
        self._began = False

    def look(self, pods: Sequence[Object], deployments: Mapping[Track, Object]) -> dict[Track, TrackCounters]:
        """Read these pods and return the totals of every track's version. A track that was taken away and deployed
        again begins anew.

        Raises:
            ExternalError: not one pod could be read.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = list(pool.map(self._read, pods))
        errors = [answer for answer in answers if isinstance(answer, ExternalError)]
        if pods and len(errors) == len(pods):
            raise errors[0]
        read: dict[Track, dict[str, dict[Track, TrackCounters]]] = {track: {} for track in deployments}
        for pod, counted in zip(pods, answers, strict=True):
            track = Track(pod["metadata"]["labels"][TRACK])
            if isinstance(counted, TrackCounters) and track in read:
                read[track][pod["metadata"]["uid"]] = {track: counted}
        self._meters = {track: self._meter(track, found) for track, found in deployments.items()}
        self._began = True
        for track, sources in read.items():
            self._meters[track][1].feed_all(sources)
        return {track: meter.totals[track] for track, (_, meter) in self._meters.items() if track in meter.totals}

    def _meter(self, track: Track, deployment: Object) -> tuple[str, Meter]:
        uid = deployment["metadata"]["uid"]
        known = self._meters.get(track)
        if known is not None and known[0] == uid:
            return known
        meter = Meter()
        if self._began:  # what is new since the last look counts in full
            meter.feed_all({})
        return uid, meter

    def _read(self, pod: Object) -> TrackCounters | ExternalError:
        try:
            return read_replica(self._fetch(pod))
        except ExternalError as error:
            return error
