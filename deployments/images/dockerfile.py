"""Read the Dockerfiles of this folder: stages, instructions, build arguments. Pure; nothing is run here.

Only what these files use is understood. Everything else is refused with its line, never skipped, so that a root
filesystem assembled from a Dockerfile holds what an engine would have built.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from configs.errors import ConfigError

# Act on the filesystem, or describe the image.
_STEPS: Final = frozenset(("ARG", "ENV", "RUN", "COPY", "WORKDIR"))
_DESCRIPTIONS: Final = frozenset(("LABEL", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"))
_COMMENT: Final = re.compile(r"\s*#")
_VARIABLE: Final = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_FROM: Final = re.compile(r"(\S+)\s+AS\s+([a-z][a-z0-9_-]*)", re.IGNORECASE)
_OPTION: Final = re.compile(r"--([a-z-]+)=(\S+)\s+")
_DURATION: Final = re.compile(r"(\d+)(ms|s|m)")
_NANOSECONDS: Final = {"ms": 10**6, "s": 10**9, "m": 60 * 10**9}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction; `options` are its leading `--name=value` pairs, in order."""

    keyword: str
    value: str
    options: tuple[tuple[str, str], ...]
    line: int


@dataclass(frozen=True, slots=True)
class Stage:
    """`FROM base AS name` and what follows. `base` is another stage's name, or an image's."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]


@dataclass(slots=True)
class ImageConfig:
    """What an image says about itself, as far as these Dockerfiles say anything. Durations are nanoseconds."""

    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    ports: list[str] = field(default_factory=list)
    user: str = ""
    workdir: str = "/"
    stop_signal: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: dict[str, object] = field(default_factory=dict)

    def to_oci(self) -> dict[str, object]:
        """The `config` object of an image, as Docker and the OCI image specification spell it."""
        said = {
            "Env": [f"{name}={value}" for name, value in self.environment.items()],
            "Labels": self.labels,
            "ExposedPorts": {port: {} for port in self.ports},
            "User": self.user,
            "WorkingDir": self.workdir,
            "StopSignal": self.stop_signal,
            "Entrypoint": self.entrypoint,
            "Cmd": self.command,
            "Healthcheck": self.healthcheck,
        }
        return {name: value for name, value in said.items() if value}


def parse(text: str, arguments: Mapping[str, str]) -> dict[str, Stage]:
    """The stages of a Dockerfile by name, in order; `arguments` replace the defaults of ARGs above the first FROM.

    Raises:
        ConfigError: an instruction that is not understood, with its line.
    """
    stages: dict[str, Stage] = {}
    given: dict[str, str] = {}
    for instruction in _instructions(text):
        if instruction.keyword == "FROM":
            stage = _stage(instruction, given)
            stages[stage.name] = stage
        elif not stages and instruction.keyword == "ARG":
            name, default = argument(instruction)
            given[name] = arguments.get(name, default)
        elif not stages or instruction.keyword not in _STEPS | _DESCRIPTIONS:
            raise refuse(instruction, "is not understood here")
        else:
            last = stages[next(reversed(stages))]
            stages[last.name] = Stage(last.name, last.base, (*last.instructions, instruction))
    return stages


def needed_by(stages: Mapping[str, Stage], target: str) -> list[Stage]:
    """The stages that `target` is built from, itself last, in the order they are built in."""
    wanted = {target}
    for stage in reversed(list(stages.values())):
        if stage.name in wanted:
            wanted |= {stage.base, *sources(stage)}
    return [stage for stage in stages.values() if stage.name in wanted]


def sources(stage: Stage) -> set[str]:
    """Stages that a stage copies from, or mounts."""
    copied = {value for step in stage.instructions for name, value in step.options if name == "from"}
    return copied | {mount["from"] for step in stage.instructions for mount in mounts(step) if "from" in mount}


def mounts(step: Instruction) -> list[dict[str, str]]:
    """What the `--mount=` options of a RUN say.

    Raises:
        ConfigError: another option, or a kind of mount that is neither `cache` nor `bind`.
    """
    if step.keyword != "RUN":
        return []
    said = [dict(part.partition("=")[::2] for part in value.split(",")) for _, value in step.options]
    for (name, value), mount in zip(step.options, said, strict=True):
        wanted = {"cache": {"type", "target"}, "bind": {"type", "source", "target"}}.get(mount.get("type", ""), set())
        if name != "mount" or not wanted or set(mount) - {"from"} != wanted:
            raise refuse(step, f"--{name}={value} is not understood here")
    return said


def argument(instruction: Instruction) -> tuple[str, str]:
    """Name and default of an ARG."""
    name, _, default = instruction.value.partition("=")
    return name, default


def substitute(text: str, variables: Mapping[str, str]) -> str:
    """Replace `$NAME` and `${NAME}`; an unknown one becomes empty, as Docker does."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), text)


def pairs(instruction: Instruction, variables: Mapping[str, str]) -> dict[str, str]:
    """The `name=value` pairs of an ENV or LABEL."""
    words = shlex.split(substitute(instruction.value, variables))
    if not all("=" in word for word in words):
        raise refuse(instruction, "wants name=value")
    return {name: value for name, _, value in (word.partition("=") for word in words)}


def describe(instruction: Instruction, config: ImageConfig, variables: Mapping[str, str]) -> None:
    """Take over one instruction that describes the image."""
    value = substitute(instruction.value, variables)
    match instruction.keyword:
        case "LABEL":
            config.labels |= pairs(instruction, variables)
        case "USER":
            config.user = value
        case "EXPOSE":
            config.ports.append(value if "/" in value else f"{value}/tcp")
        case "STOPSIGNAL":
            config.stop_signal = value
        case "HEALTHCHECK":
            config.healthcheck = _healthcheck(instruction)
        case "ENTRYPOINT":
            config.entrypoint = exec_form(instruction)
        case "CMD":
            config.command = exec_form(instruction)
        case _:
            raise refuse(instruction, "is not understood here")


def exec_form(instruction: Instruction) -> list[str]:
    """The JSON list of an ENTRYPOINT or CMD; the shell form would put a shell between the kernel's signals and us."""
    try:
        words = json.loads(instruction.value)
    except json.JSONDecodeError:
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise refuse(instruction, 'wants the exec form, ["program", "argument"]')
    return words


def refuse(instruction: Instruction, why: str) -> ConfigError:
    """An error that names the line."""
    return ConfigError(f"Dockerfile, line {instruction.line}: {instruction.keyword} {why}. Nothing was built.")


def ignored(path: str, rules: Sequence[str]) -> bool:
    """Whether a .dockerignore keeps `path` (relative, with slashes) from the builder; the last rule that matches wins.

    https://docs.docker.com/build/concepts/context/#dockerignore-files
    """
    verdict = False
    parents = path.split("/")
    candidates = ["/".join(parents[: depth + 1]) for depth in range(len(parents))]
    for rule in rules:
        pattern = _glob(rule.removeprefix("!").strip("/"))
        if any(pattern.fullmatch(candidate) for candidate in candidates):
            verdict = not rule.startswith("!")
    return verdict


def ignore_rules(text: str) -> tuple[str, ...]:
    """The rules of a .dockerignore."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _instructions(text: str) -> Iterable[Instruction]:
    """Join continued lines, drop comments, split off the options."""
    lines = enumerate(text.splitlines(), 1)
    for number, line in lines:
        if not line.strip() or _COMMENT.match(line):
            continue
        whole = line
        while whole.endswith("\\"):
            _, following = next(lines, (0, ""))
            whole = whole if _COMMENT.match(following) else whole[:-1] + following
        keyword, _, rest = whole.strip().partition(" ")
        yield _split(keyword.upper(), rest.strip(), number)


def _split(keyword: str, rest: str, number: int) -> Instruction:
    options = []
    while match := _OPTION.match(rest):
        options.append((match[1], match[2]))
        rest = rest[match.end() :]
    return Instruction(keyword, rest, tuple(options), number)


def _stage(instruction: Instruction, given: Mapping[str, str]) -> Stage:
    match = _FROM.fullmatch(substitute(instruction.value, given))
    if match is None:
        raise refuse(instruction, "wants `FROM image AS name`")
    return Stage(match[2], match[1], ())


def _healthcheck(instruction: Instruction) -> dict[str, object]:
    if instruction.value == "NONE":
        return {"Test": ["NONE"]}
    said: dict[str, object] = {"Test": ["CMD", *exec_form(_split("CMD", instruction.value.removeprefix("CMD"), 0))]}
    for name, value in instruction.options:
        key = "".join(part.capitalize() for part in name.split("-"))
        duration = _DURATION.fullmatch(value)
        said[key] = int(duration[1]) * _NANOSECONDS[duration[2]] if duration else int(value)
    return said


def _glob(pattern: str) -> re.Pattern[str]:
    """Go's filepath.Match with `**`, as a regular expression."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(piece, re.escape(piece)) for piece in pieces))
