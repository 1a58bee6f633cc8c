"""How an attempt begins: room for it, the cluster that it works on, its job, and the process that does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from pipelines.engine.events import Started
from pipelines.engine.headline import hardware_of
from pipelines.engine.lease import Lease
from pipelines.engine.placement import Demand, why_no_room
from pipelines.engine.plan import Action, PlannedStage
from pipelines.engine.processes import Cluster, Launcher, Outcome, StageJob
from pipelines.engine.stage import StageInputs
from pipelines.engine.under_way import StageRun
from pipelines.tracking.run_tracking import RunTracking


@dataclass(frozen=True)
class AttemptEnded:
    """Tells the scheduler how an attempt ended."""

    stage: str
    attempt: int
    outcome: Outcome


class Dispatcher:
    """Starts the attempts of one run, for the owner of its lease."""

    def __init__(
        self,
        run_id: str,
        lease: Lease,
        tracking: RunTracking,
        cluster: Cluster,
        launcher: Launcher,
        lease_ttl_s: float,
        lease_renew_s: float,
    ) -> None:
        """`lease_ttl_s`, `lease_renew_s`: of the leases of artifacts, which the attempts hold."""
        self._run_id, self._lease, self._tracking = run_id, lease, tracking
        self._cluster, self._launcher = cluster, launcher
        self._lease_ttl_s, self._lease_renew_s = lease_ttl_s, lease_renew_s

    def why_no_room(self, planned: PlannedStage, running: Iterable[PlannedStage]) -> str | None:
        """Why the cluster has no room for the stage beside those that run now; None: there is room."""
        demand = Demand.of(planned.node)
        if demand is None:
            return None
        held = [found for other in running if (found := Demand.of(other.node)) is not None]
        return why_no_room(demand, held, self._cluster.nodes())

    def start(
        self,
        stage: StageRun,
        inputs: StageInputs,
        on_end: Callable[[AttemptEnded], None],
        on_metrics: Callable[[int, Mapping[str, float]], None],
        on_notice: Callable[[str], None],
    ) -> Started:
        """Begin the stage's next attempt, and return the event that says so.

        Args: inputs: with results. on_end, on_metrics, on_notice: called from other threads.
        Raises: UserError, InfrastructureError: there is no cluster, or the kind of stage cannot be handed over.
        """
        planned = stage.planned
        stage.attempt += 1
        attempt = stage.attempt
        connect = self._join_cluster() if planned.node.stage.uses_cluster else None
        log_name = f"{planned.name}.{self._lease.number:06d}-{attempt}.log"
        journal = self._tracking.journal_path(planned.name)
        job = StageJob(
            run_id=self._run_id,
            planned=planned,
            inputs=inputs,
            attempt=attempt,
            journal=journal,
            log=self._tracking.log_dir / log_name,
            system_metrics=self._tracking.options.system_metrics,
            lease_ttl_s=self._lease_ttl_s,
            lease_renew_s=self._lease_renew_s,
            connect=connect,
        )
        process = self._launcher.start(job, lambda outcome: on_end(AttemptEnded(planned.name, attempt, outcome)))
        stage.begin(process, journal, on_metrics, on_notice)
        return Started(
            stage=planned.name,
            attempt=attempt,
            resumed=planned.action is Action.RESUME or attempt > 1,
            artifact=planned.artifact.relpath,
            log=f"logs/{log_name}",
            pid=process.pid,
            host=self._lease.owner.host,
        )

    def _join_cluster(self) -> Callable[[], None]:
        connect = self._cluster.start()
        self._tracking.log_tags({"bmojo.cluster": hardware_of(self._cluster.nodes())})
        return connect
