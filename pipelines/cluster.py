"""The Ray cluster a run works on: started on this machine, or joined."""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from base.errors import UserError
from pipelines.config import ClusterConfig
from pipelines.engine.interrupts import kept_handlers
from pipelines.engine.process import submitted_job
from pipelines.engine.stage import AnyNode, StageConfig
from pipelines.errors import InfrastructureError, LostError
from pipelines.faults import Fault, explain_disk, of_number
from pipelines.packages import PACKAGES, REPOSITORY
from pipelines.ray_errors import explained_ray
from pipelines.tracking.environment import TELEMETRY_OFF

OBJECT_STORE_BYTES = 256 * 2**20  # stages pass paths, never data, so little is needed
LOOPBACK_ONLY = {  # for a cluster of this machine alone: nothing listens to the network
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # in spite of its name, on every system: the node's address is 127.0.0.1
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}

_REACH_S = 10.0  # for a machine to accept a connection
_MAX_TEMP_DIR = 107 - len("/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")  # AF_UNIX paths have 107

log = logging.getLogger(__name__)


def ensure_cluster(config: ClusterConfig, num_cpus: int, num_neuron_cores: int = 0) -> None:
    """Start or join the Ray cluster, once per process. Inside a Ray job, `local` means the cluster that runs the job.

    Args: num_cpus: slots of a cluster that is started. num_neuron_cores: its NeuronCores; 0: those that Ray finds.

    Raises:
        UserError: the address, a setting or the token is wrong.
        InfrastructureError: the cluster does not answer, or Ray does not start here, twice.
    """
    address = cluster_address(config)
    if address == "local":
        for name, value in LOOPBACK_ONLY.items():
            os.environ.setdefault(name, value)  # Ray reads these once, when it is imported
    import ray

    if ray.is_initialized():
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    with kept_handlers():
        if address == "local":
            _start_local(num_cpus, num_neuron_cores)
        else:
            join(address)


def cluster_address(config: ClusterConfig) -> str:
    """Where to work: as configured, but a Ray job whose file says `local` joins the cluster that runs it."""
    return "auto" if config.address == "local" and submitted_job() else config.address


def check_address(config: ClusterConfig, graph: Iterable[AnyNode]) -> None:
    """Refuse stages that cannot run through Ray Client. Raises: UserError."""
    kinds = [node.stage.kind for node in graph if node.stage.uses_cluster]
    if kinds and config.address.startswith("ray://"):
        host = config.address.removeprefix("ray://").partition(":")[0]
        raise UserError(
            f"cluster.address={config.address}: {kinds[0]} stages cannot run through Ray Client (ray://). Submit the "
            f"pipeline to the cluster instead: bmojo submit CONFIG --address http://{host}:8265. Or, on a machine of "
            "the cluster, run it with cluster.address=auto, or with the address of the head itself (HEAD:6379)."
        )


def cpus_for(stages: Iterable[StageConfig]) -> int:
    """CPU slots so that the largest stage fits; slots are Ray's bookkeeping, the system shares the cores."""
    asked = [stage.resources.num_workers * stage.resources.cpus_per_worker for stage in stages]
    return max([os.cpu_count() or 1, *(math.ceil(cpus) for cpus in asked)])


def neuron_cores_for(stages: Iterable[StageConfig]) -> int:
    """This machine's logical NeuronCores, if a stage asks for some: Ray looks for neuron-ls in one folder alone."""
    if not any(stage.resources.neuron_cores_per_worker for stage in stages):
        return 0
    from pipelines.neuron import runtime  # imports torch

    return runtime.num_cores()


def _start_local(num_cpus: int, num_neuron_cores: int) -> None:
    try:
        _init_local(num_cpus, num_neuron_cores)
    except (UserError, InfrastructureError):
        raise
    except Exception as error:
        log.warning("Ray did not start (%s); trying once more.", _brief(error))
        try:
            _init_local(num_cpus, num_neuron_cores)
        except (UserError, InfrastructureError):
            raise
        except Exception as second:
            raise InfrastructureError(
                f"Ray did not start on this machine, twice ({_brief(second)}). The machine is busy, or short of memory "
                "or processes; Ray's own logs are in the session_latest folder of its temporary directory. The same "
                "command resumes."
            ) from second


def _init_local(num_cpus: int, num_neuron_cores: int) -> None:
    import ray

    children = set(psutil.Process().children(recursive=True))
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            resources={"neuron_cores": num_neuron_cores} if num_neuron_cores else None,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.ERROR,
            log_to_driver=False,  # the run's own log files keep the workers' output
            _temp_dir=_short_temp_dir(),
        )
    except BaseException as error:
        ray.shutdown()
        for process in set(psutil.Process().children(recursive=True)) - children:  # of the half-started cluster
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if isinstance(error, OSError) and of_number(error) in (Fault.FULL, Fault.USER):
            raise explain_disk(error) or error from error
        raise


def session_folder() -> Path:
    """Where the sessions of Ray clusters lie that are started here; it may not exist."""
    chosen = _usual_temp_dir() / "ray"
    return chosen if len(os.fsencode(chosen)) <= _MAX_TEMP_DIR else _short()


def _usual_temp_dir() -> Path:
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _short() -> Path:
    return Path(f"/tmp/bmojo-ray-{os.getuid()}")


def _short_temp_dir() -> str | None:
    """Where Ray keeps its sockets: None (its own choice) unless TMPDIR is too long for the path of a socket.

    Raises: UserError: it is, and /tmp cannot be used.
    """
    chosen, short = _usual_temp_dir(), _short()
    if session_folder() != short:
        return None
    try:
        short.mkdir(mode=0o700, exist_ok=True)
        usable = short.stat().st_uid == os.getuid() and os.access(short, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise UserError(
            f"The temporary directory {chosen} (RAY_TMPDIR or TMPDIR) is too long for Ray's sockets, and {short} "
            f"cannot be used. Set RAY_TMPDIR to a directory of at most {_MAX_TEMP_DIR - len('/ray')} characters."
        )
    return str(short)


def join_local(address: str) -> None:
    """Join the cluster that the run started on this machine, from the process of a stage."""
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    with kept_handlers(), explained_ray("Joining the local Ray cluster"):
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=True)
        except ConnectionError as error:
            raise LostError(f"The local Ray cluster does not answer ({_brief(error)}).") from error


def join(address: str) -> None:
    """Join the cluster at a configured address.

    Raises: UserError: the address or the token is wrong. InfrastructureError: it does not answer.
    """
    import ray

    log.warning("Connecting to the Ray cluster at %s ...", address)
    _require_reachable(address)
    runtime_env: dict[str, Any] = {"env_vars": TELEMETRY_OFF}
    if address != "auto":  # other machines get our packages; this one has them
        runtime_env |= {"working_dir": str(REPOSITORY), "excludes": _not_shipped()}
    try:
        with kept_handlers(), explained_ray(f"cluster.address={address}"):
            ray.init(address=address, runtime_env=runtime_env, logging_level=logging.ERROR, log_to_driver=True)
    except (UserError, InfrastructureError) as error:
        if not isinstance(error.__cause__, ConnectionError):
            raise
        if address == "auto":
            raise UserError(
                f"cluster.address=auto: no Ray cluster runs on this machine ({_brief(error.__cause__)}). Start one "
                "(`ray start --head`), give its address, or set cluster.address=local."
            ) from error
        raise _not_taken_in(address, error.__cause__) from error
    except ValueError as error:
        raise UserError(f"cluster.address={address}: {_brief(error)}. {_ADDRESS_HELP}") from error
    except Exception as error:
        raise _not_taken_in(address, error) from error


def _not_taken_in(address: str, error: BaseException) -> InfrastructureError:
    """A wrong token, another version of Ray and a head that has just died all look alike from here."""
    return InfrastructureError(
        f"cluster.address={address}: the Ray cluster does not take us in ({_brief(error)}). See `ray status` on its "
        "head. A cluster that asks for a token, as one does by default that is started where ~/.ray/auth_token exists, "
        "needs RAY_AUTH_MODE=token here and its token in ~/.ray/auth_token or RAY_AUTH_TOKEN. The same command resumes."
    )


_ADDRESS_HELP = "Give the head's address as HOST:PORT (`ray status` there shows it), auto, or local."


def _require_reachable(address: str) -> None:
    """Say within seconds, in our own words, that nobody is there; Ray itself tries for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"cluster.address={address} is not an address. {_ADDRESS_HELP}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"cluster.address={address}: there is no machine {host} ({error}). {_ADDRESS_HELP}") from error
    except ConnectionRefusedError as error:
        raise UserError(
            f"cluster.address={address}: nothing listens on port {port} of {host}. Start the cluster's head there, or "
            f"correct the address. {_ADDRESS_HELP}"
        ) from error
    except OSError as error:
        raise InfrastructureError(
            f"cluster.address={address}: {host} does not answer ({error}). Check that machine and the network; the "
            "same command resumes."
        ) from error


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _not_shipped() -> list[str]:
    """Everything at the top of the checkout but our packages: data, runs and the environment stay here."""
    return [f"/{entry.name}" for entry in REPOSITORY.iterdir() if entry.name not in PACKAGES]
