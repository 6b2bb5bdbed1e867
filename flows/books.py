"""What a rollback reads and writes about versions: in the registry as long as that answers, always in the cluster.

A rollback is wanted at the worst moment, which may be that of the object store too. So whatever the registry is asked
is asked within seconds, and once it did not answer it is not asked again: the cluster remembers what is needed, and
what the registry has still to be told (`recovery.settle` tells it).
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from prefect import get_run_logger
from prefect.exceptions import MissingContextError

from configs.errors import ConfigError, ExternalError, GateError, IntegrityError, KhetError
from flows import recovery
from flows.session import LEASE, LEASE_TTL_S
from flows.systems import Systems
from ml.version import Version
from tasks.cluster import Memory, Pending, Served
from tasks.lease import Lease, break_lease
from tasks.progress import report
from tasks.rollout.journal import Journal, Outcome, ReleaseRecord, utc_now

T = TypeVar("T")
ANSWER_S: Final = 5.0  # a registry that is well answers a whole step in a fraction of this
_TIDY_S: Final = 30.0  # when all traffic has moved, there is time to read the other runs' records
# On top of the time that replicas may take to become ready: so long nobody else may touch the cluster, should it die.
_MARGIN_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of the versions: what production points at, what it pointed at before, and all that served."""

    current: Version | None
    previous: Version | None
    served: tuple[Version, ...]
    source: str

    def choose(self, to: str) -> Version:
        """The version to return to.

        Raises:
            GateError: there is no such version to return to.
        """
        if to == "previous":
            if self.previous is None:
                raise GateError(f"There is no previous version to roll back to ({self.source}). Nothing was changed.")
            return self.previous
        target = Version.parse(to)
        if target not in self.served:
            names = ", ".join(str(version) for version in self.served) or "none"
            raise GateError(f"{target} never served production (by {self.source}: {names}). Nothing was changed.")
        return target


def from_registry(systems: Systems, to: str) -> Known:
    """What the registry says. Its history is only read where `to` names a version."""
    production, previous = systems.registry.alias("production"), systems.registry.alias("previous")
    moves = systems.registry.alias_history("production") if to != "previous" else ()
    return Known(
        production.version if production else None,
        previous.version if previous else None,
        tuple(sorted({move.to for move in moves if move.to})),
        "the registry",
    )


def from_cluster(memory: Memory) -> Known:
    """What the cluster remembers. Pure."""
    served = [Version.parse(entry.version) for entry in memory.served]
    current = served[0] if served else None
    return Known(current, memory.before(current), tuple(sorted(set(served))), "what the cluster remembers")


class Books:
    """The books of one rollback. `lost`: why the registry is not asked any more."""

    def __init__(self, systems: Systems) -> None:
        self.systems = systems
        self.lost: KhetError | None = None
        self._registry = systems.impatient(ANSWER_S)
        self._journal: Journal | None = None
        self._begun = False
        self._owner = ""

    def ask(self, what: str, call: Callable[[Systems], T], seconds: float | None = None) -> T | None:
        """The registry's answer, None when it has none in time or had none before."""
        if self.lost is not None:
            return None
        try:
            return within(seconds or ANSWER_S, what, lambda: call(self._registry))
        except (ExternalError, ConfigError, IntegrityError) as error:
            self.lost = error
            text = f"the registry did not serve ({what}): {str(error).splitlines()[0]} Going on without it."
            _say(text)
            report("registry", "note", text)
            return None

    def known(self, to: str) -> Known:
        """What is known for a rollback to `to`: by the cluster, where the registry does not answer or has still to be
        told of the last rollback."""
        memory = self.systems.cluster.memory()
        remembered = {Version.parse(entry.version) for entry in memory.served}
        # A long history takes a while to read: only where the cluster cannot tell.
        asked = "previous" if to in map(str, remembered) else to
        if memory.pending is None:
            found = self.ask("reading its aliases", lambda registry: from_registry(registry, asked))
            if found is not None:
                return replace(found, served=tuple(sorted(remembered.union(found.served))))
        return from_cluster(memory)

    @contextlib.contextmanager
    def hold(self, record: ReleaseRecord, *, force: bool) -> Iterator[None]:
        """Nobody else changes the cluster in this block. A rollout that runs is refused, unless the registry, which
        knows of it, is silent: then it loses, for users come first.

        Raises:
            SafetyError: a rollout or another rollback is running; `force` takes over from it.
        """
        cluster, owner = self.systems.cluster, record.release_id
        with contextlib.ExitStack() as held:
            lease = self.ask("taking its lease", lambda registry: _take_lease(registry, owner, force=force))
            if lease is not None:
                held.enter_context(lease)
            self._owner = owner
            # On record first: of a run that has the cluster alone it must be known whether it lives.
            self._journal = self.ask(
                "opening its record", lambda registry: Journal.start(registry.store, registry.bucket, record)
            )
            held.callback(_quietly, lambda: cluster.remember(lambda memory: memory.given_back(owner)))
            try:
                self.stay_alone(force=force)
                yield
            except KhetError as error:
                if not self._begun:
                    self.close(record, "failed", (str(error).splitlines()[0],))
                raise

    def stay_alone(self, *, force: bool = False) -> None:
        """Nobody else may change the cluster until the next step is done.

        Raises:
            SafetyError: another rollback took it.
        """
        alone_s = self.systems.settings.cluster.ready_timeout_s + _MARGIN_S
        self.systems.cluster.remember(lambda memory: memory.taken(self._owner, utc_now(), alone_s=alone_s, force=force))

    def intend(self, pending: Pending) -> None:
        """Write down what is about to change, so that somebody can finish it after a crash."""
        self._begun = True
        self.systems.cluster.remember(lambda memory: memory.model_copy(update={"pending": pending}))
        self._write(lambda journal: journal.intend("rollback", pending.version, pending.previous))

    def served(self, entry: Served) -> None:
        """Write down that a version has all traffic now."""
        self.systems.cluster.remember(lambda memory: memory.with_served(entry))

    def settle(self, pending: Pending) -> None:
        """Point production at the version that serves, end what other runs had begun, and forget the intent. A registry
        that is silent is told later."""
        self.ask("moving production", lambda registry: _move(registry, pending), _TIDY_S)
        self.ask("ending other runs", lambda registry: recovery.supersede(registry, pending.run_id, utc_now()), _TIDY_S)
        if self.lost is None:
            self.systems.cluster.remember(lambda memory: memory.without(pending))

    def forget(self, pending: Pending) -> None:
        """What was begun has been put back: there is nothing to finish."""
        self.systems.cluster.remember(lambda memory: memory.without(pending))
        self._begun = False

    def close(self, record: ReleaseRecord, outcome: Outcome, reasons: tuple[str, ...]) -> ReleaseRecord:
        """End the record; where the registry is silent it is entered later."""
        self._write(lambda journal: journal.close(outcome, reasons))
        return record.model_copy(update={"outcome": outcome, "reasons": reasons, "finished_at": utc_now()})

    def _write(self, change: Callable[[Journal], object]) -> None:
        journal = self._journal
        if journal is not None:
            self.ask("writing its record", lambda _: change(journal))


def within(seconds: float, what: str, call: Callable[[], T]) -> T:
    """The answer of `call`, where it comes in time. A call that is late goes on in the background and harms nobody:
    what it writes is what was asked for.

    Raises:
        ExternalError: it does not.
    """
    answers: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # noqa: BLE001  (handed on)
            answers.put((None, error))

    threading.Thread(target=work, name=f"asking: {what}", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise ExternalError(f"no answer within {seconds:g} s while {what}.") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def _take_lease(registry: Systems, owner: str, *, force: bool) -> Lease:
    recovery.free_lease_of_the_dead(registry, LEASE)
    if force:
        break_lease(registry.store, registry.bucket, LEASE, by=owner)
    return Lease.acquire(registry.store, registry.bucket, LEASE, owner, LEASE_TTL_S)


def _move(registry: Systems, pending: Pending) -> None:
    registry.registry.move_alias("production", Version.parse(pending.version), by=pending.by, reason=pending.reason)


def _say(text: str) -> None:
    """In the flow's log, or in the process's where a person asks for the history outside of a flow."""
    try:
        get_run_logger().error(text)
    except MissingContextError:
        logging.getLogger(__name__).error(text)


def _quietly(work: Callable[[], object]) -> None:
    """The right to act alone ends by itself too."""
    with contextlib.suppress(KhetError):
        work()
