"""The file for `ray up`: by Ray's own schema, and as far as Ray's launcher goes against a stand-in for AWS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND

from tests.docs.pages import ROOT

FILE = ROOT / "examples" / "clusters" / "aws.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return loaded


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_a_wrong_field_would_be_found(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu-spot"]["minworkers"] = 1
    with pytest.raises(Exception, match="minworkers"):
        validate_config(prepare_config(cluster))


def test_the_head_is_kept_and_workers_may_go(cluster: dict[str, Any]) -> None:
    head, *workers = cluster["available_node_types"].values()
    assert cluster["head_node_type"] == next(iter(cluster["available_node_types"]))
    assert head["labels"] == {"ray.io/market-type": "on-demand"}
    assert "InstanceMarketOptions" not in head["node_config"]
    for worker in workers:
        assert worker["labels"] == {"ray.io/market-type": "spot"}
        assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_every_node_has_the_token_and_nobody_else(cluster: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/bmojo/.ray/auth_token": "~/.ray/auth_token"}
    head_starts = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head_starts
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head_starts
    assert "IpPermissions" not in cluster["provider"]["security_group"], "Ray opens SSH, and all inside the group"


def test_ec2_starts_what_is_asked(cluster: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray makes key, network and instances from it; boto3 checks the names and types of all that is asked of EC2."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the key goes to ~/.ssh
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-only-secret")
    (tmp_path / ".ssh").mkdir()
    with mock_aws():
        import boto3

        image = boto3.client("ec2", "us-west-2").describe_images()["Images"][0]["ImageId"]
        iam = boto3.client("iam")
        for kind in cluster["available_node_types"].values():
            node = kind["node_config"]
            assert node["ImageId"] == "AMI_WITH_DOCKER"
            name = node["IamInstanceProfile"]["Arn"].removeprefix("arn:aws:iam::ACCOUNT:instance-profile/")
            profile = iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]
            node |= {"ImageId": image, "IamInstanceProfile": {"Arn": profile["Arn"]}}
        ready = bootstrap_aws(prepare_config(cluster))
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for name, kind in ready["available_node_types"].items():
            made = provider.create_node(kind["node_config"], {TAG_RAY_NODE_KIND: name}, 1)
            (instance,) = made.values()
            assert instance.instance_type == cluster["available_node_types"][name]["node_config"]["InstanceType"]
        assert len(provider.non_terminated_nodes({})) == 2
        (group,) = boto3.client("ec2", "us-west-2").describe_security_groups(GroupNames=["bmojo"])["SecurityGroups"]
        from_outside = [rule["FromPort"] for rule in group["IpPermissions"] if rule["IpRanges"]]
        assert from_outside == [22]
