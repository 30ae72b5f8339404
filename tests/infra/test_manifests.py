import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.config import CaptionConfig

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text(encoding="utf-8")))


def document(name: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in documents(name) if each["kind"] == kind]
    return found


def commands() -> list[str]:
    """Return every command line that infra/ gives to a cluster."""
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    submitted = re.findall(r"ray job submit .* -- (python .*?)(?: >>.*)?$", readme, re.MULTILINE)
    assert len(submitted) == 2
    return [document("rayjob.yaml", "RayJob")["spec"]["entrypoint"], *submitted]


@pytest.mark.parametrize("command", commands())
def test_what_is_submitted_is_a_job_of_this_repository_with_keys_it_knows(command: str) -> None:
    python, job, *arguments = shlex.split(command)
    assert python == "python"
    assert (ROOT / job.removeprefix("/app/")).is_file()
    assert cli.load(CaptionConfig, arguments).source == "s3://bucket/videos"


def test_the_nightly_cluster_is_the_standing_one() -> None:
    standing = document("cluster.yaml", "RayCluster")["spec"]
    assert document("rayjob.yaml", "RayJob")["spec"]["rayClusterSpec"] == standing


def test_the_cluster_has_a_decode_group_and_a_gpu_group_of_fixed_size() -> None:
    spec = document("cluster.yaml", "RayCluster")["spec"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"decode", "gpu"}
    for name, group in groups.items():
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        assert ("nvidia.com/gpu" in limits) == (name == "gpu")
        assert container["image"].endswith("-gpu") == (name == "gpu")
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token"}


def test_the_ray_of_the_manifest_is_the_one_installed_in_the_image() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    version = document("cluster.yaml", "RayCluster")["spec"]["rayVersion"]
    assert f"ray=={version}" in constraints


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("absent", ["create -f /manifests/rayjob.yaml"]),
        ("Complete", ["delete rayjob caption-corpus", "create -f /manifests/rayjob.yaml"]),
        ("Failed", ["delete rayjob caption-corpus", "create -f /manifests/rayjob.yaml"]),
        ("Running", []),
        ("Initializing", []),
        ("", []),  # made a moment ago, not yet seen by KubeRay
    ],
)
def test_the_nightly_start_never_joins_or_ends_a_run_that_goes_on(
    tmp_path: Path, state: str, expected: list[str]
) -> None:
    spec = document("nightly.yaml", "CronJob")["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    # a kubectl that knows one RayJob and writes down what is changed
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'*"-o name") [ "{state}" = absent ] || echo rayjob.ray.io/caption-corpus ;;\n'
        f'*jobDeploymentStatus*) printf "%s" "{state}" ;;\n'
        f'*) echo "$*" >> {tmp_path}/changes ;;\n'
        "esac\n"
    )
    kubectl.chmod(0o755)
    done = subprocess.run(
        [*container["command"], *container["args"]],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    changes = tmp_path / "changes"
    assert (changes.read_text().splitlines() if changes.exists() else []) == expected
    assert ("nothing started" in done.stdout) == (expected == [])


def test_the_nightly_start_reads_the_job_it_is_given() -> None:
    (generator,) = document("kustomization.yaml", "Kustomization")["configMapGenerator"]
    assert generator["files"] == ["rayjob.yaml"]
    pod = document("nightly.yaml", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == generator["name"]
    name = document("rayjob.yaml", "RayJob")["metadata"]["name"]
    assert name == "caption-corpus"
    role = document("nightly.yaml", "Role")
    assert role["rules"][0]["resources"] == ["rayjobs"]
    assert {"get", "create", "delete"} <= set(role["rules"][0]["verbs"])


def test_the_crontab_line_does_not_overlap() -> None:
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^ +(\d+ \d+ \* \* \* .*)$", readme, re.MULTILINE)
    assert " flock -n " in line
    assert "%" not in line  # cron would read it as the end of the line


def test_the_image_copies_files_that_exist() -> None:
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        part for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for part in line.split()
    ]
    assert {"omnisift", "pipeline", "jobs", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert [part for part in copied if not (ROOT / part).exists()] == []
