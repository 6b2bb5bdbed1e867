"""The embedded stack of the local profile: servers that production has elsewhere, started and watched on one machine.

Nothing outside this folder knows that they are embedded: everybody else reads addresses from the settings.
"""

from __future__ import annotations

from deployments.local.doctor import doctor
from deployments.local.lifecycle import choose, down, status, up
from deployments.local.prefect_parts import flow_environment
from deployments.local.state import Check, PartEvent, PartState, Phase, StackState

__all__ = [
    "Check",
    "PartEvent",
    "PartState",
    "Phase",
    "StackState",
    "choose",
    "doctor",
    "down",
    "flow_environment",
    "status",
    "up",
]
