import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import cli
from pipeline.config import CaptionConfig, CompactConfig, DecodeConfig

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
LARGEST = DecodeConfig().max_size_bytes
RAY = "ray==2.60.0"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text(encoding="utf-8")))


def document(name: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in documents(name) if each["kind"] == kind]
    return found


def entrypoints() -> list[str]:
    """Return every command line that infra/ gives to a cluster."""
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    submitted = re.findall(
        r"ray job submit .* -- ((?:python|sh) .*?)(?: >>.*)?$", readme, re.MULTILINE
    )
    assert len(submitted) == 2
    return [document("rayjob.yaml", "RayJob")["spec"]["entrypoint"], *submitted]


def run_as_ray_does(entrypoint: str, folder: Path, *, fails: str = "no-job") -> list[list[str]]:
    """Run an entrypoint with a python that notes its arguments; it ends with 1 for one job."""
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\ncase "$1" in *{fails}) exit 1 ;; esac\n'
    )
    python.chmod(0o755)
    # a shell takes the line apart (KubeRay's submitter, cron), `ray job submit` joins it again
    joined = subprocess.list2cmdline(shlex.split(entrypoint))
    subprocess.run(
        ["/bin/sh", "-c", joined],
        env={"PATH": f"{folder}:/usr/bin:/bin"},
        timeout=30,
        check=fails == "no-job",
    )
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("entrypoint", entrypoints())
def test_what_is_submitted_are_jobs_of_this_repository_with_keys_they_know(
    entrypoint: str, tmp_path: Path
) -> None:
    (job, *arguments), *after = run_as_ray_does(entrypoint, tmp_path)
    assert (ROOT / job.removeprefix("/app/")).is_file()
    config = cli.load(CaptionConfig, arguments)
    assert config.source == "s3://bucket/videos"
    for job, *arguments in after:
        assert job.removeprefix("/app/") == "jobs/compact.py"
        assert cli.load(CompactConfig, arguments).cache_root == config.cache_root


def test_every_night_ends_with_compaction_unless_the_run_failed(tmp_path: Path) -> None:
    nightly, _by_hand, crontab = entrypoints()
    for number, entrypoint in enumerate((nightly, crontab)):
        whole, broken = tmp_path / f"whole{number}", tmp_path / f"broken{number}"
        for folder in (whole, broken):
            folder.mkdir()
        names = [Path(job).name for job, *_ in run_as_ray_does(entrypoint, whole)]
        assert names == ["caption_corpus.py", "compact.py"]
        calls = run_as_ray_does(entrypoint, broken, fails="caption_corpus.py")
        assert [Path(job).name for job, *_ in calls] == ["caption_corpus.py"]


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
        # every CPU may decode, and holds one download of the largest size meanwhile
        where = "/tmp"  # noqa: S108 (decode.temp_dir is the system's)
        downloads = [m["name"] for m in container["volumeMounts"] if m["mountPath"] == where]
        [size] = [
            volume["emptyDir"]["sizeLimit"]
            for volume in group["template"]["spec"]["volumes"]
            if [volume["name"]] == downloads
        ]
        assert int(size.removesuffix("Gi")) << 30 >= int(limits["cpu"]) * LARGEST
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["authOptions"] == {"mode": "token"}


def test_the_ray_of_the_manifest_is_the_one_installed_in_the_image() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    version = document("cluster.yaml", "RayCluster")["spec"]["rayVersion"]
    assert f"ray=={version}" in constraints


def test_machines_have_disks_for_their_downloads_and_a_head_that_may_start_them() -> None:
    (launcher,) = documents("machines.yaml")
    types = launcher["available_node_types"]
    for name in ("decode", "gpu"):
        (disk,) = types[name]["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] * 10**9 > types[name]["resources"]["CPU"] * LARGEST
    # Ray's own profile for a head may not give the workers theirs (iam:PassRole)
    profiles = {name: each["node_config"]["IamInstanceProfile"] for name, each in types.items()}
    head = profiles.pop("head")
    assert head["Name"] not in {profile["Name"] for profile in profiles.values()}
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    assert f"`{head['Name']}`" in readme
    assert "iam:PassRole" in readme


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("absent", ["create -f /manifests/rayjob.yaml"]),
        ("Complete", ["delete rayjob caption-corpus", "create -f /manifests/rayjob.yaml"]),
        ("Failed", ["delete rayjob caption-corpus", "create -f /manifests/rayjob.yaml"]),
        ("ValidationFailed", ["delete rayjob caption-corpus", "create -f /manifests/rayjob.yaml"]),
        ("Running", []),
        ("Initializing", []),
        ("Retrying", []),
        ("Waiting", []),
        ("Suspended", []),
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


def test_no_crontab_line_overlaps() -> None:
    readme = (INFRA / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ +(\d+ \d+ \* \* \* .*)$", readme, re.MULTILINE)
    assert len(lines) == 2  # on a cluster, on one machine
    for line in lines:
        assert " flock -n " in line
        assert "%" not in line  # cron would read it as the end of the line
        # The output is compacted when the run has ended, and not when it failed.
        assert re.search(r"jobs/caption_corpus\.py [^&;]* && \S*python jobs/compact\.py ", line)


def test_the_image_copies_files_that_exist() -> None:
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        part for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for part in line.split()
    ]
    assert {"omnisift", "pipeline", "jobs", "pyproject.toml", "constraints.txt"} <= set(copied)
    assert [part for part in copied if not (ROOT / part).exists()] == []


@pytest.mark.parametrize(
    ("device", "vllm", "expected"),
    [
        ("cpu", "", ["--constraint", "constraints.txt", "--editable", "."]),
        ("gpu", "", ["--constraint", "constraints.txt", "--editable", ".[gpu]"]),
        *[
            (
                device,
                "vllm==0.32.0 transformers==5.19.0",
                ["--editable", ".[gpu,vllm]", "vllm==0.32.0", "transformers==5.19.0", RAY],
            )
            for device in ("cpu", "gpu")  # the head's too: the driver looks for it where it runs
        ],
    ],
)
def test_the_image_installs_what_its_arguments_say(
    tmp_path: Path, device: str, vllm: str, expected: list[str]
) -> None:
    text = (INFRA / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", "")
    (line,) = [run for run in re.findall(r"^RUN (.*)$", text, re.MULTILINE) if "pip install" in run]
    assert set(re.findall(r"^ARG (\w+)=", text, re.MULTILINE)) >= {"DEVICE", "VLLM"}
    pip = tmp_path / "pip"
    pip.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    pip.chmod(0o755)
    subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=ROOT,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device, "VLLM": vllm},
        timeout=30,
        check=True,
    )
    given = (tmp_path / "arguments").read_text().splitlines()
    assert given == ["install", "--no-cache-dir", *expected]
