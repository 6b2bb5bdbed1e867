"""`python -m deployments.kubernetes.checks`: build everything, check everything, say what was checked."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Final

from configs.errors import ConfigError, KhetError
from deployments.kubernetes.checks import policy, schemas
from deployments.kubernetes.checks.build import ENVIRONMENTS, ROOT, TRAINING, Object, build, environment
from deployments.kubernetes.checks.pools import TEMPLATES, job

_POOLS: Final = ("kubernetes", "gpu")


def check() -> tuple[list[str], dict[str, list[Object]]]:
    """Everything that is wrong, and the objects that were looked at, by where they come from.

    Raises:
        ConfigError: a folder cannot be built.
    """
    wrong = []
    groups: dict[str, list[Object]] = {f"overlays/{name}": environment(name) for name in ENVIRONMENTS}
    for where, objects in groups.items():
        wrong += [f"{where}: {problem}" for problem in policy.unresolved(objects)]
    groups |= {where: build(ROOT / where) for where in TRAINING}
    groups |= {f"work-pools/{pool}.json": [job(TEMPLATES / f"{pool}.json")] for pool in _POOLS}
    for where, objects in groups.items():
        wrong += [f"{where}: {problem}" for one in objects for problem in _problems(one)]
    return wrong, groups


def _problems(found: Object) -> Iterable[str]:
    for problem in policy.violations(found):
        yield f"{policy.name(found)}: {problem}"
    for version in schemas.VERSIONS:
        for problem in schemas.problems(found, version):
            yield f"{policy.name(found)}: {problem}"


def main() -> int:
    """Exit code 0, or ConfigError's when something is wrong."""
    try:
        wrong, groups = check()
    except KhetError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for problem in wrong:
        print(problem, file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} problems.", file=sys.stderr)
        return ConfigError.exit_code
    for where, objects in groups.items():
        print(f"{where}: {len(objects)} objects")
    print(f"All are valid for Kubernetes {schemas.VERSIONS[0]}-{schemas.VERSIONS[-1]} and keep the rules.")
    for (api_version, kind), file in schemas.CUSTOM.items():
        print(f"{kind} ({api_version}) against {file.relative_to(ROOT)}, not against the schema of a cluster.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
