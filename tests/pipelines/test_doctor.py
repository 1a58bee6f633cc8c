"""`bmojo doctor` finds what is wrong and says what to do."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from kernels.cpp import library
from pipelines import doctor
from pipelines.tracking.mlflow.target import MlflowTarget


def test_this_environment_passes(tmp_path: Path) -> None:
    checks = {check.name: check for check in doctor.run_checks(str(tmp_path))}
    assert not [check for check in checks.values() if check.verdict == "error"]
    assert checks["ray"].found


def test_a_storage_that_cannot_be_written_is_an_error() -> None:
    (check,) = (check for check in doctor.run_checks("/proc/nowhere") if check.name == "storage")
    assert check.verdict == "error"
    assert "storage" in check.advice


def test_a_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", ("no-such-package",))
    (check,) = (check for check in doctor.run_checks() if check.name == "no-such-package")
    assert check.verdict == "error"
    assert "make install" in check.advice


def test_an_untested_version_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_tested_versions", lambda: {"pydantic": "0.0.1"})
    (check,) = (check for check in doctor.run_checks() if check.name == "pydantic")
    assert check.verdict == "warning"
    assert "0.0.1" in check.advice


def test_a_missing_compiler_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    library.load.cache_clear()
    (check,) = (check for check in doctor.run_checks() if check.name == "C++ kernels")
    assert check.verdict == "warning"
    assert "no C++ compiler (no-such-compiler)" in check.found
    assert "plain torch, slower on the CPU" in check.advice


def test_a_taken_port_is_a_warning() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = doctor._ui_port(port)
    assert (check.verdict, check.advice) == ("warning", "Choose another one: bmojo ui --port.")
    assert doctor._ui_port(port).verdict == "ok"


def test_an_mlflow_that_does_not_import_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._tracker_works(MlflowTarget).verdict == "ok"
    monkeypatch.setitem(sys.modules, "mlflow", None)  # what Python itself sets for a module that cannot be imported
    assert doctor._tracker_works(MlflowTarget).verdict == "error"


def test_operators_and_why_some_run_as_plain_torch():
    (check,) = (check for check in doctor.run_checks() if check.name == "operators")
    assert check.verdict == "ok"
    assert "ssd_scan" in check.found
    assert "selective_scan on torch: it has no C++ path" in check.advice
