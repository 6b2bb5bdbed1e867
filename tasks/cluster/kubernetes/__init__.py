"""Kubernetes as a cluster: a Deployment a track, one Service for the users and one for each track.

client.py      the API server: a few verbs on plain dicts, time limits, what its refusals mean
objects.py     the manifests; state.py: weights, mirroring and lease as annotations and a Lease
traffic.py     which pods get traffic where no gateway splits it; capacity.py, readiness.py: pure too
counting.py    counters from every pod's /metrics
adapter.py     all of it put together, behind `tasks.cluster.Cluster`
permissions.py what all this may do; inspection.py, probe.py: the doctor; addresses.py: where pods find this machine
"""

from __future__ import annotations

from tasks.cluster.kubernetes.adapter import KubernetesCluster

__all__ = ["KubernetesCluster"]
