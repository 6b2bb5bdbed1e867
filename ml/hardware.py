"""What this process runs on, and how many threads it should use. No torch at import time."""

from __future__ import annotations

import os
import platform
from pathlib import Path

# Idle OpenMP threads that spin starve the others on shared cores (4-8 times slower, measured).
_QUIET = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}


def quiet_threads() -> None:
    """Let idle threads sleep. Works only before torch is imported, so process entries call it first."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def first_rank() -> bool:
    """Whether this is the process that writes, of all that train one model.

    torchrun numbers them over all machines (RANK); Lightning starts those of one machine as copies with LOCAL_RANK.
    """
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def cores() -> int:
    """Cores this process may use: its affinity, cut by the container's CPU quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota(Path("/sys/fs/cgroup/cpu.max"))))


def _quota(path: Path) -> int:
    """Whole cores of a cgroup v2 quota ("max 100000" or "150000 100000"); a large number where there is none."""
    try:
        quota, period = path.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return 1 << 16
    return 1 << 16 if quota == "max" else max(1, round(int(quota) / int(period)))


def describe() -> dict[str, str]:
    """Names and versions for the lineage of a model: processor, cores, memory, accelerators, libraries."""
    import torch

    facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cores": str(cores()),
        "memory_gib": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}",
        "torch": str(torch.__version__),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
        facts["accelerators"] = str(torch.cuda.device_count())
        facts["cuda"] = str(torch.version.cuda)
    return facts


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
