"""Each manifest against the schema of who reads it: Kubernetes, KubeRay, Ray's launcher."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml

INFRA = Path(__file__).parents[2] / "infra"
KUBERAY = yaml.safe_load(Path(__file__).with_name("kuberay-v1.yaml").read_text(encoding="utf-8"))
RAY_UP = json.loads(files(ray.autoscaler).joinpath("ray-schema.json").read_text(encoding="utf-8"))
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((INFRA / name).read_text(encoding="utf-8")))


def check_kubernetes(document: dict[str, Any]) -> None:
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(document, version, strict=True)


def templates(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the pod templates of a custom resource, wherever they stand."""
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if name in ("template", "submitterPodTemplate"):
            yield inner
        elif isinstance(inner, (dict, list)):
            yield from templates(inner)


def check_kuberay(document: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(KUBERAY).validate(document)
    for template in templates(document["spec"]):
        check_kubernetes(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template}
        )


def check_ray_up(document: dict[str, Any]) -> None:
    jsonschema.Draft7Validator(RAY_UP).validate(document)
    types = document["available_node_types"]
    assert document["head_node_type"] in types
    assert sum(each.get("max_workers", 0) for each in types.values()) == document["max_workers"]


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "cluster.yaml": check_kuberay,
    "rayjob.yaml": check_kuberay,
    "nightly.yaml": check_kubernetes,
    "machines.yaml": check_ray_up,
}


def test_every_manifest_has_a_schema() -> None:
    # kustomize has none; what its file names is compared in test_manifests.py
    assert {path.name for path in INFRA.glob("*.yaml")} == {*CHECKS, "kustomization.yaml"}


@pytest.mark.parametrize("name", CHECKS)
def test_manifests_are_what_their_readers_take(name: str) -> None:
    for document in documents(name):
        CHECKS[name](document)


def _wrong(name: str, number: int, path: str, value: Any) -> tuple[str, int, list[str | int], Any]:
    keys = [int(key) if key.isdigit() else key for key in path.split("/")]
    return name, number, keys, value


@pytest.mark.parametrize(
    ("name", "number", "keys", "value"),
    [
        _wrong("cluster.yaml", 0, "apiVersion", "ray.io/v1alpha1"),
        _wrong("cluster.yaml", 0, "metadata/name", "Omnisift_1"),
        _wrong("cluster.yaml", 0, "spec/rayVersion", 2.6),
        _wrong("cluster.yaml", 0, "spec/authOptions/mode", "tokens"),
        _wrong("cluster.yaml", 0, "spec/headGroupSpec/rayStartParams/num-cpus", 0),
        _wrong("cluster.yaml", 0, "spec/workerGroupSpecs/0/replica", 4),
        _wrong("cluster.yaml", 0, "spec/workerGroupSpecs/0/maxReplicas", "4"),
        _wrong("cluster.yaml", 0, "spec/workerGroupSpecs/1/template/spec/container", []),
        _wrong("cluster.yaml", 0, "spec/workerGroupSpecs/1/template/spec/tolerations", {}),
        _wrong(
            "cluster.yaml",
            0,
            "spec/workerGroupSpecs/0/template/spec/containers/0/securityContext/runAsNonRoots",
            True,
        ),
        _wrong("rayjob.yaml", 0, "spec/activeDeadlineSeconds", 0),
        _wrong("rayjob.yaml", 0, "spec/ttlSecondsAfterFinish", 600),
        _wrong(
            "rayjob.yaml", 0, "spec/rayClusterSpec/headGroupSpec/template/spec/containers", None
        ),
        _wrong("nightly.yaml", 0, "spec/concurrencyPolicies", "Forbid"),
        _wrong("nightly.yaml", 0, "spec/schedule", 15),
        _wrong("nightly.yaml", 0, "spec/jobTemplate/spec/template/spec/restartPolicies", "Never"),
        _wrong("nightly.yaml", 2, "rules/0/verbs", "get"),
        _wrong("nightly.yaml", 3, "roleRef/kinds", "Role"),
        _wrong("machines.yaml", 0, "max_worker", 6),
        _wrong("machines.yaml", 0, "available_node_types/gpu/resources/GPU", "1"),
        _wrong("machines.yaml", 0, "available_node_types/gpu/min_workers", "2"),
        _wrong("machines.yaml", 0, "provider/type", 1),
    ],
)
def test_a_mistake_is_seen(name: str, number: int, keys: list[str | int], value: Any) -> None:
    document = deepcopy(documents(name)[number])
    place: Any = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        CHECKS[name](document)


def test_no_container_may_gain_rights() -> None:
    pods = [
        *templates(documents("rayjob.yaml")[0]["spec"]),
        *templates(documents("nightly.yaml")[0]["spec"]["jobTemplate"]["spec"]),
    ]
    assert len(pods) == 4
    for pod in pods:
        for container in pod["spec"]["containers"]:
            context = container["securityContext"]
            assert context["runAsNonRoot"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}
