"""Storage under faults: a real S3 server behind a proxy that breaks requests, and disks that are really full."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ReadTimeoutError,
    ResponseStreamingError,
)
from s3fs.errors import ERROR_CODE_TO_EXCEPTION, translate_boto_error

from base.errors import UserError
from pipelines.engine.lease import Clock, Lease, lease_holder
from pipelines.errors import InfrastructureError
from pipelines.faults import FULL_NUMBERS, TRANSIENT_NUMBERS, USER_NUMBERS, Fault, explained_disk, judge
from pipelines.stages.tasks import user_errors
from pipelines.storage import Storage, objects, open_storage
from pipelines.storage import storage as storage_module
from tests.pipelines.faulty_proxy import FaultyProxy


class HandSetTime:
    """A `time` module whose clock only its own sleep moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sleeps_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def hand_set(monkeypatch: pytest.MonkeyPatch) -> HandSetTime:
    """The time by which storages wait between two tries."""
    hand_set = HandSetTime()
    monkeypatch.setattr(storage_module, "time", hand_set)
    return hand_set


FAULTS = ["503 SlowDown", "500 InternalError", "400 RequestTimeout", "429 TooManyRequests"]


@pytest.mark.ci
@pytest.mark.parametrize("fault", [*FAULTS, "reset", "lost"])
def test_a_spell_of_a_fault_is_survived_by_every_call(
    s3_storage: Storage, proxy: FaultyProxy, tmp_path: Path, fault: str
) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/x").write_bytes(b"x" * 1000)
    calls = {
        "write": lambda: s3_storage.write_bytes_atomic("a/1", b"1"),
        "put": lambda: s3_storage.put_tree(tmp_path / "tree", "a/tree"),
        "create": lambda: s3_storage.create_exclusive("a/2", b"by me"),
        "read": lambda: s3_storage.read_bytes("a/1"),
        "list": lambda: s3_storage.list("a"),
        "files": lambda: sorted(s3_storage.files_under("a")),
        "get": lambda: s3_storage.get_tree("a/tree", tmp_path / "copy"),
        "exists": lambda: s3_storage.exists("a/1"),
        "delete": lambda: s3_storage.delete("a/1"),
        "gone": lambda: s3_storage.exists("a/1"),
    }
    results = {}
    for name, call in calls.items():
        proxy.first(3, fault, "PUT" if fault == "400 RequestTimeout" else None)  # an answer to HEAD has no code
        results[name] = call()
    assert results == {
        "write": None,
        "put": None,
        "create": True,
        "read": b"1",
        "list": ["1", "2", "tree"],
        "files": ["1", "2", "tree/x"],
        "get": None,
        "exists": True,
        "delete": None,
        "gone": False,
    }
    assert (tmp_path / "copy/x").read_bytes() == b"x" * 1000


def test_half_an_answer_is_never_taken_for_the_whole(s3_storage: Storage, proxy: FaultyProxy, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    s3_storage.write_bytes_atomic("x", data)
    proxy.first(2, "partial", "GET")
    assert s3_storage.read_bytes("x") == data
    proxy.first(2, "partial", "GET")
    s3_storage.get_file("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == data


@pytest.mark.ci
@pytest.mark.parametrize("fault", ["503 SlowDown", "reset", "500 InternalError"])
def test_a_fault_that_stays_is_the_infrastructures_and_leaves_nothing_behind(
    s3_storage: Storage, proxy: FaultyProxy, tmp_path: Path, hand_set: HandSetTime, fault: str
) -> None:
    s3_storage.write_bytes_atomic("x", b"old")
    proxy.fault = lambda method, path: fault
    impatient = s3_storage.with_retry_s(1.0)
    for call in (
        lambda: impatient.read_bytes("x"),
        lambda: impatient.write_bytes_atomic("x", b"new"),
        lambda: impatient.create_exclusive("y", b"new"),
        lambda: impatient.list(),
        lambda: impatient.get_file("x", tmp_path / "x"),
    ):
        with pytest.raises(InfrastructureError, match=r"s3://.*the same command resumes"):
            call()
    assert len(hand_set.sleeps_s) > 3 * 5, "each call was tried again for a while"
    assert os.listdir(tmp_path) in ([], ["cache"])
    proxy.fault = lambda method, path: None
    assert s3_storage.read_bytes("x") == b"old"
    assert not s3_storage.exists("y")


def test_a_store_that_hangs_is_given_up(
    s3_storage: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.3)
    s3fs.S3FileSystem.clear_instance_cache()
    proxy.fault = lambda method, path: "hang"
    with pytest.raises(InfrastructureError, match=r"[Tt]ime"):
        s3_storage.with_retry_s(1.0).read_bytes("x")


def test_a_store_out_of_reach_is_said_sooner_where_it_never_answered(
    s3_storage: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "FIRST_RETRY_S", 0.5)
    proxy.close()
    with pytest.raises(InfrastructureError, match=r"Cannot list s3://never/seen/runs"):
        open_storage("s3://never/seen").list("runs")


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (403, "SignatureDoesNotMatch"), (400, "Custom")])
def test_a_refusal_is_the_users_at_once(s3_storage: Storage, proxy: FaultyProxy, status: int, code: str) -> None:
    proxy.fault = lambda method, path: f"{status} {code}"
    with pytest.raises(UserError, match=f"not allowed or not possible.*{code}"):
        s3_storage.write_bytes_atomic("x", b"1")
    assert len(proxy.requests) == 1


def test_of_racing_creators_one_wins_though_answers_get_lost(s3_storage: Storage, proxy: FaultyProxy) -> None:
    for round_ in range(3):
        proxy.first(2, "lost", "PUT")
        winners: list[int] = []

        def create(number: int, name: str, winners: list[int]) -> None:
            if s3_storage.create_exclusive(name, str(number).encode()):
                winners.append(number)

        threads = [threading.Thread(target=create, args=(n, f"one-{round_}", winners)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [str(winner).encode() for winner in winners] == [s3_storage.read_bytes(f"one-{round_}")]


def test_a_creation_that_was_refused_is_not_taken_for_ones_own(s3_storage: Storage, proxy: FaultyProxy) -> None:
    assert s3_storage.create_exclusive("x", b"mine")
    assert not s3_storage.create_exclusive("x", b"another's")
    proxy.first(1, "reset", "PUT")
    assert not s3_storage.create_exclusive("x", b"a third's")


@pytest.mark.parametrize(("pause_s", "num_requests", "delay_s"), [(0.02, 3, 0.0), (3600.0, 1, 0.5)])
def test_an_interrupt_ends_the_trying(
    s3_storage: Storage,
    proxy: FaultyProxy,
    monkeypatch: pytest.MonkeyPatch,
    pause_s: float,
    num_requests: int,
    delay_s: float,
) -> None:
    """It comes while the store is asked, or in a pause of an hour; the trying itself would last for days."""
    s3_storage.write_bytes_atomic("x", b"1")
    monkeypatch.setenv("BMOJO_STORAGE_RETRY_S", str(1e6))
    monkeypatch.setattr(storage_module, "_PAUSE_S", (pause_s, pause_s))
    proxy.requests.clear()

    main = threading.main_thread().ident
    assert main is not None

    def slow_down(method: str, path: str) -> str:
        if len(proxy.requests) == num_requests:
            threading.Timer(delay_s, signal.pthread_kill, (main, signal.SIGINT)).start()
        return "503 SlowDown"

    proxy.fault = slow_down
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray leaves a handler of its own behind
    try:
        with pytest.raises(KeyboardInterrupt):
            s3_storage.read_bytes("x")
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)  # None: one that C code installed


# ---- a lease on a store with faults


def test_a_renewal_asks_once_because_the_next_is_due_soon(s3_storage: Storage, proxy: FaultyProxy) -> None:
    lease = Lease.acquire(s3_storage, "lease", "run x", start=False)
    proxy.requests.clear()
    proxy.fault = lambda method, path: "503 SlowDown"
    lease.renew()
    assert len(proxy.requests) == 1
    proxy.fault = lambda method, path: None
    lease.require_in_force()


def test_what_the_owner_must_know_or_tell_outlives_a_spell(s3_storage: Storage, proxy: FaultyProxy) -> None:
    proxy.first(3, "503 SlowDown", "PUT")
    lease = Lease.acquire(s3_storage, "lease", "run x", start=False)
    proxy.first(3, "503 SlowDown")
    lease.require_in_force()
    proxy.first(3, "503 SlowDown", "PUT")
    lease.release()
    assert lease_holder(s3_storage, "lease") is None


def test_a_check_of_the_lease_gives_up_before_the_lease_expires(
    s3_storage: Storage, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, hand_set: HandSetTime
) -> None:
    clock = Clock(monotonic=hand_set.monotonic)
    lease = Lease.acquire(s3_storage, "lease", "run x", ttl_s=12.0, clock=clock, start=False)
    monkeypatch.setattr(storage_module, "_PAUSE_S", (0.1, 1.0))
    proxy.fault = lambda method, path: "503 SlowDown"
    with pytest.raises(InfrastructureError, match=r"Cannot list s3://.*lease"):
        lease.require_in_force()
    assert len(hand_set.sleeps_s) > 3, "it was tried again for a while"
    lease.require()
    proxy.fault = lambda method, path: None
    lease.release()


# ---- what each error means


# A mistake in the call, not a state of the disk: a bug. ENOENT is FileNotFoundError, which callers judge.
NOT_OF_STORAGE = {
    *"ENOENT ESRCH E2BIG ENOEXEC EBADF ECHILD EFAULT ENOTBLK EINVAL ENOTTY ESPIPE EDOM ERANGE".split(),  # noqa: SIM905
    *"ENOMSG EIDRM ECHRNG EL2NSYNC EL3HLT EL3RST ELNRNG EUNATCH ENOCSI EL2HLT EBADE EBADR EXFULL".split(),  # noqa: SIM905
    *"ENOANO EBADRQC EBADSLT EBFONT ENOSTR ENOPKG EREMOTE EADV ESRMNT EMULTIHOP EDOTDOT".split(),  # noqa: SIM905
    *"EOVERFLOW ENOTUNIQ EBADFD ELIBACC ELIBBAD ELIBSCN ELIBMAX ELIBEXEC ESTRPIPE ENOTSOCK".split(),  # noqa: SIM905
    *"EDESTADDRREQ EMSGSIZE EPROTOTYPE ENOPROTOOPT EPROTONOSUPPORT ESOCKTNOSUPPORT EPFNOSUPPORT".split(),  # noqa: SIM905
    *"EAFNOSUPPORT EISCONN ENOTNAM ENAVAIL EISNAM ERFKILL".split(),  # noqa: SIM905
}


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_number_of_the_system_is_one_thing_on_purpose(number: int) -> None:
    name = errno.errorcode[number]
    meanings = [number in FULL_NUMBERS, number in USER_NUMBERS, number in TRANSIENT_NUMBERS, name in NOT_OF_STORAGE]
    assert sum(meanings) == 1, name
    fault = judge(OSError(number, os.strerror(number))).fault
    assert fault is (Fault.FULL, Fault.USER, Fault.TRANSIENT, Fault.BUG)[meanings.index(True)]


STATUS = {
    "SlowDown": 503,
    "ServiceUnavailable": 503,
    "InternalError": 500,
    "OperationAborted": 409,
    "RequestTimeout": 400,
}
TRANSIENT_S3 = {
    *STATUS,
    "BadDigest",
    "IncompleteBody",
    "RestoreAlreadyInProgress",
    "TemporaryRedirect",
    "409",
    "500",
    "503",
}
BUG_S3 = {
    *"EntityTooSmall InvalidDigest InvalidPart InvalidPartOrder InvalidRange MalformedXML".split(),  # noqa: SIM905
    *"MethodNotAllowed MissingContentLength MissingRequestBodyError NoSuchUpload".split(),  # noqa: SIM905
    *"PreconditionFailed UnexpectedContent 412 416".split(),  # noqa: SIM905
}


@pytest.mark.parametrize("code", sorted(ERROR_CODE_TO_EXCEPTION))
@pytest.mark.parametrize("translated", [False, True])
def test_every_error_code_of_s3_is_one_thing_on_purpose(code: str, translated: bool) -> None:
    status = int(code) if code.isdigit() else STATUS.get(code, 400)
    error: Exception = ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )
    if translated:
        error = translate_boto_error(error)
    expected = Fault.TRANSIENT if code in TRANSIENT_S3 else Fault.BUG if code in BUG_S3 else Fault.USER
    assert judge(error).fault is expected


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (EndpointConnectionError(endpoint_url="http://x"), Fault.TRANSIENT),
        (ConnectTimeoutError(endpoint_url="http://x"), Fault.TRANSIENT),
        (ReadTimeoutError(endpoint_url="http://x"), Fault.TRANSIENT),
        (ConnectionClosedError(endpoint_url="http://x"), Fault.TRANSIENT),
        (ResponseStreamingError(error="cut"), Fault.TRANSIENT),
        (NoCredentialsError(), Fault.USER),
        (ValueError("Invalid endpoint: nonsense"), Fault.USER),
        (PermissionError("Access Denied"), Fault.USER),
        (TimeoutError(), Fault.TRANSIENT),
        (ConnectionResetError("gone"), Fault.TRANSIENT),
        (ZeroDivisionError(), Fault.BUG),
    ],
)
def test_errors_without_an_answer_are_judged_by_their_class(error: Exception, fault: Fault) -> None:
    assert judge(error).fault is fault


@pytest.mark.parametrize(
    ("status", "fault"), [(503, Fault.TRANSIENT), (429, Fault.TRANSIENT), (403, Fault.USER), (507, Fault.FULL)]
)
@pytest.mark.parametrize("attribute", ["status_code", "status", "code"])
def test_the_shapes_of_azure_aiohttp_and_google_errors_are_read(attribute: str, status: int, fault: Fault) -> None:
    error = type("HttpResponseError", (Exception,), {attribute: status})("refused")
    assert judge(error).fault is fault


# ---- full disks and files in the way


def _write_with_file_limit(directory: Path, limit: int) -> str:
    """A real process whose files may not grow past `limit`: what a writer sees of a quota, as root or not."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    code = (
        "import resource, signal, sys; from pipelines.storage import open_storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {hard}))\n"
        "try: open_storage(sys.argv[1]).write_bytes_atomic('x', b'1' * 100_000)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    return subprocess.run([sys.executable, "-c", code, str(directory)], capture_output=True, text=True).stdout


def test_a_write_cut_short_by_a_limit_leaves_the_old_file(tmp_path: Path) -> None:
    open_storage(tmp_path).write_bytes_atomic("x", b"old")
    assert "UserError" in _write_with_file_limit(tmp_path, 10_000)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skipped where none may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_named_and_the_same_call_works_after_making_room(
    small_disk: Path, tmp_path: Path, hand_set: HandSetTime
) -> None:
    storage = open_storage(small_disk)
    storage.write_bytes_atomic("old", b"1" * 600_000)
    big = tmp_path / "big"
    big.write_bytes(b"2" * 600_000)
    for call in (
        lambda: storage.write_bytes_atomic("new", b"2" * 600_000),
        lambda: storage.create_exclusive("new", b"2" * 600_000),
        lambda: storage.put_tree(big, "new"),
        lambda: open_storage(tmp_path).get_file("big", small_disk / "new"),
    ):
        with pytest.raises(InfrastructureError, match=r"no space is left.*Make room, then the same command resumes"):
            call()
        assert not hand_set.sleeps_s, "a full disk is not tried again"
        assert os.listdir(small_disk) == ["old"]
    storage.delete("old")
    storage.put_tree(big, "new")
    assert (small_disk / "new").read_bytes() == big.read_bytes()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_as_storage_is_refused_by_every_call(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    storage = open_storage(tmp_path / place)
    for call in (
        lambda: storage.list("runs"),
        lambda: storage.list(),
        lambda: storage.read_bytes("runs/x"),
        lambda: storage.exists("runs/x"),
        lambda: storage.create_exclusive("lease", b""),
        lambda: storage.check_writable(),
    ):
        with pytest.raises(UserError, match=r"is a file, or is below one"):
            call()
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "/shards: No space left on device. Make room"),
        (errno.EIO, "/shards: Input/output error. Check that disk"),
        (errno.ECONNRESET, "ConnectionResetError: Connection reset by peer"),
        (errno.EHOSTUNREACH, "OSError: No route to host"),
        (errno.ETIMEDOUT, "TimeoutError: Connection timed out"),
    ],
)
def test_a_write_that_names_no_file_is_of_what_was_being_written_unless_it_is_the_network(
    number: int, text: str
) -> None:
    with pytest.raises(InfrastructureError) as caught, explained_disk(Path("/shards")):
        raise OSError(number, os.strerror(number))
    assert str(caught.value).startswith(text)


def test_a_stage_that_writes_to_a_full_disk_says_which(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"1" * 900_000)
    with (
        pytest.raises(InfrastructureError, match=f"{small_disk}: No space left on device. Make room"),
        user_errors(small_disk),
        open(small_disk / "shard", "wb") as file,
    ):  # write() and close() name no file in their errors
        file.write(b"2" * 600_000)
