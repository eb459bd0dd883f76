# SPDX-License-Identifier: Apache-2.0
"""What is in cluster/: each manifest is what KubeRay takes, is confined, and names what there is.

No Kubernetes runs here. Every check of a manifest is a function that returns complaints; the tests
see that there are none, and that the same function complains of a manifest that is damaged.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import ray
import yaml

import offsite_ray
from tests.conftest import ROOT
from tests.test_package import pins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
PARTIES = ("model-owner", "data-owner")
FILES = sorted(KUBERAY.rglob("*.yaml"))
SCHEMA = json.loads((KUBERAY / "schema.json").read_text())
GPU = "nvidia.com/gpu"
OUR_IMAGE = re.compile(
    rf"registry\.example\.com/offsite-ray:{re.escape(offsite_ray.__version__)}-(cpu|cuda)"
)
OTHER_IMAGES = {"redis:7.4"}

Document = dict[str, Any]


def documents(path: Path) -> list[Document]:
    """Return the documents of a file; what aliases share in YAML is nobody else's here."""
    loaded: list[Document] = json.loads(json.dumps(list(yaml.safe_load_all(path.read_text()))))
    return loaded


def of_kind(kind: str, path: Path) -> Document:
    (document,) = (document for document in documents(path) if document["kind"] == kind)
    return document


def party(name: str) -> list[Document]:
    paths = sorted((KUBERAY / name).glob("*.yaml"))
    return [document for path in paths for document in documents(path)]


def found(node: Any, key: str, where: str = "") -> Iterator[tuple[str, Document]]:
    """Yield every mapping that has a key, and where it is."""
    if isinstance(node, dict):
        if key in node:
            yield where, node
        for name, value in node.items():
            yield from found(value, key, f"{where}.{name}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from found(value, key, f"{where}.{index}")


def containers(document: Document) -> Iterator[tuple[str, Document]]:
    for where, pod in found(document, "containers"):
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            yield f"{where}: {container['name']}", container


def autoscalers(document: Document) -> Iterator[tuple[str, Document]]:
    """Yield the settings of the container that KubeRay puts beside a head."""
    for where, cluster in found(document, "autoscalerOptions"):
        yield f"{where}: autoscaler", cluster["autoscalerOptions"]


def clusters(document: Document) -> Iterator[Document]:
    yield from (spec for _, spec in found(document, "headGroupSpec"))


def gpus(container: Document) -> int:
    return int(container["resources"]["limits"].get(GPU, 0))


def gpus_of_workers(cluster: Document) -> int:
    """Return the GPUs that a cluster grows to."""
    return sum(
        group["maxReplicas"] * gpus(group["template"]["spec"]["containers"][0])
        for group in cluster["workerGroupSpecs"]
    )


def misfits(document: Document) -> Iterator[str]:
    """What KubeRay or Kubernetes does not know, and what must be there."""
    for error in jsonschema.Draft202012Validator(SCHEMA).iter_errors(document):
        yield f"{error.json_path}: {error.message}"


def unequal_resources(document: Document) -> Iterator[str]:
    """What is not asked for as it is limited."""
    for where, spec in (*containers(document), *autoscalers(document)):
        if "resources" not in spec:
            yield f"{where}: no resources"
            continue
        limits, requests = spec["resources"].get("limits"), spec["resources"].get("requests")
        if limits != requests or not {"cpu", "memory"} <= set(limits or ()):
            yield f"{where}: {requests} asked for, {limits} the limit"


def unconfined(document: Document) -> Iterator[str]:
    """What could be root, become it, or see the machine."""
    for where, pod in found(document, "containers"):
        security = pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{where}: may run as root"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{where}: any system call"
        yield from (f"{where}: {key}" for key in pod if key.startswith("host"))
        yield from (f"{where}: hostPath" for v in pod.get("volumes", ()) if "hostPath" in v)
        # The head that has an autoscaler beside it asks Kubernetes for pods.
        scaled = where.endswith(".headGroupSpec.template.spec") and any(
            cluster.get("enableInTreeAutoscaling") for cluster in clusters(document)
        )
        if pod.get("automountServiceAccountToken", True) is not scaled:
            yield f"{where}: the token of a service account is {'not ' * scaled}mounted"
    for where, container in (*containers(document), *autoscalers(document)):
        confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        if container.get("securityContext") != confined:
            yield f"{where}: may become root"


def secret_values(document: Document) -> Iterator[str]:
    """What is no reference to a secret, but one."""
    if document["kind"] == "Secret":
        yield "a Secret has no place in a repository"
    for where, variable in found(document, "value"):
        if re.search(
            r"TOKEN|PASSWORD|SECRET|KEY|AUTH",
            str(variable.get("name", variable.get("key", "PASSWORD"))),
        ):
            yield f"{where}: {variable} has a value"
    for line in yaml.safe_dump(document).splitlines():
        if re.search(r"[0-9a-fA-F]{24}|[0-9A-Za-z+/]{40}", line):
            yield f"like a secret: {line.strip()}"


def open_clusters(document: Document) -> Iterator[str]:
    """Clusters that answer without a token."""
    for cluster in clusters(document):
        options = cluster.get("authOptions", {})
        if options.get("mode") != "token" or not options.get("secretName"):
            yield f"authOptions is {options}"


def misplaced_gpus(document: Document) -> Iterator[str]:
    """GPUs without a toleration or CUDA; tolerations without a GPU."""
    for where, pod in found(document, "containers"):
        num_gpus = sum(map(gpus, pod["containers"]))
        tolerated = any(toleration["key"] == GPU for toleration in pod.get("tolerations", ()))
        if tolerated is not (num_gpus > 0):
            yield f"{where}: {num_gpus} GPUs, tolerations {pod.get('tolerations')}"
        if num_gpus and not all(c["image"].endswith("-cuda") for c in pod["containers"]):
            yield f"{where}: GPUs, and an image without CUDA"


def unprobed(document: Document) -> Iterator[str]:
    """Containers that stay up, and that nobody asks how they do."""
    for where, container in containers(document):
        if container["name"] in ("ray-job-submitter", "files"):
            continue
        for probe in ("livenessProbe", "readinessProbe"):
            if not {"httpGet", "exec"} & set(container.get(probe, ())):
                yield f"{where}: no {probe}"


def other_versions(document: Document) -> Iterator[str]:
    """Images and versions of Ray that are not this project's."""
    for where, container in containers(document):
        image = container["image"]
        if not OUR_IMAGE.fullmatch(image) and image not in OTHER_IMAGES:
            yield f"{where}: {image}"
    for cluster in clusters(document):
        if not cluster["rayVersion"] == pins()["ray"] == ray.__version__:
            yield f"rayVersion {cluster['rayVersion']}, not {pins()['ray']}"


def loose_mounts(document: Document) -> Iterator[str]:
    """Mounts of no volume, and volumes of what nothing in the same namespace makes."""
    namespace = document["metadata"].get("namespace")
    for name in PARTIES if namespace is None else (namespace,):
        made = {(made["kind"], made["metadata"]["name"]) for made in party(name)}
        for where, pod in found(document, "containers"):
            volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
            mounts = [m for c in pod["containers"] for m in c.get("volumeMounts", ())]
            yield from (
                f"{where}: no volume {mount['name']}"
                for mount in mounts
                if mount["name"] not in volumes.keys() | claimed(document)
            )
            for volume in volumes.values():
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                config = volume.get("configMap", {}).get("name")
                if claim and ("PersistentVolumeClaim", claim) not in made:
                    yield f"{where}: no claim {claim} in {name}"
                if config and ("ConfigMap", config) not in made:
                    yield f"{where}: no ConfigMap {config} in {name}"


def claimed(document: Document) -> set[str]:
    """Return the volumes that a StatefulSet makes for its pods."""
    templates = [
        t for _, s in found(document, "volumeClaimTemplates") for t in s["volumeClaimTemplates"]
    ]
    return {template["metadata"]["name"] for template in templates}


CHECKS: tuple[Callable[[Document], Iterator[str]], ...] = (
    misfits, unequal_resources, unconfined, secret_values, open_clusters, misplaced_gpus, unprobed,
    other_versions, loose_mounts,
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(KUBERAY).as_posix())
def test_nothing_is_to_be_said_of_a_manifest(
    path: Path, check: Callable[[Document], Iterator[str]]
) -> None:
    loaded = documents(path)
    assert loaded
    assert [said for document in loaded for said in check(document)] == []


SCALED_HEAD = "headGroupSpec.template.spec"
HEAD = f"rayClusterSpec.{SCALED_HEAD}"
WORKER = "rayClusterSpec.workerGroupSpecs.0"
DAMAGE: tuple[tuple[Callable[[Document], Iterator[str]], str, Any], ...] = (
    (misfits, "entryPoint", "python x.py"),
    (misfits, f"{WORKER}.groupName", None),
    (misfits, f"{WORKER}.minReplicas", "1"),
    (misfits, "rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
    (misfits, f"{WORKER}.template.spec.containers", None),
    (misfits, "rayClusterSpec.rayVersion", None),
    (unequal_resources, f"{HEAD}.containers.0.resources.requests.cpu", "1"),
    (unequal_resources, f"{HEAD}.containers.0.resources.limits", None),
    (unequal_resources, "submitterPodTemplate.spec.containers.0.resources", None),
    (unequal_resources, "autoscalerOptions.resources", None),
    (unconfined, f"{HEAD}.securityContext.runAsNonRoot", False),
    (unconfined, f"{HEAD}.securityContext.runAsUser", 0),
    (unconfined, f"{HEAD}.containers.0.securityContext.capabilities", None),
    (unconfined, f"{HEAD}.hostNetwork", True),
    (unconfined, f"{HEAD}.automountServiceAccountToken", None),
    (unconfined, f"{SCALED_HEAD}.automountServiceAccountToken", False),
    (unconfined, f"{WORKER}.template.spec.automountServiceAccountToken", None),
    (unconfined, "autoscalerOptions.securityContext", None),
    (secret_values, f"{HEAD}.containers.0.env.0", {"name": "RAY_AUTH_TOKEN", "value": "x"}),
    (secret_values, "runtimeEnvYAML", "env_vars: {X: 8f14e45fceea167a5a36dedd4bea2543}"),
    (open_clusters, "rayClusterSpec.authOptions.mode", "disabled"),
    (open_clusters, "rayClusterSpec.authOptions.secretName", None),
    (misplaced_gpus, f"{WORKER}.template.spec.tolerations", None),
    (misplaced_gpus, f"{WORKER}.template.spec.containers.0.image", "offsite-ray:0.1.0-cpu"),
    (unprobed, f"{HEAD}.containers.0.livenessProbe", None),
    (other_versions, f"{HEAD}.containers.0.image", "rayproject/ray:2.60.0"),
    (other_versions, "rayClusterSpec.rayVersion", "2.59.0"),
    (loose_mounts, f"{HEAD}.volumes.0", None),
    (loose_mounts, f"{HEAD}.volumes.0.persistentVolumeClaim.claimName", "other"),
    (loose_mounts, f"{HEAD}.volumes.1.configMap.name", "other"),
)  # fmt: skip


@pytest.mark.parametrize(("check", "place", "value"), DAMAGE)
def test_a_damaged_manifest_is_told(
    check: Callable[[Document], Iterator[str]], place: str, value: Any
) -> None:
    scaled = place.startswith((SCALED_HEAD, "autoscalerOptions"))
    kind, name = ("RayCluster", "ray-cluster") if scaled else ("RayJob", "sweep")
    document = of_kind(kind, KUBERAY / "model-owner" / f"{name}.yaml")
    assert not list(check(document))
    *path, last = (int(word) if word.isdigit() else word for word in ["spec", *place.split(".")])
    node: Any = document
    for step in path:
        node = node[step]
    if value is None:
        del node[last]
    else:
        node[last] = value
    assert list(check(document))


@pytest.mark.parametrize("name", PARTIES)
def test_a_party_is_alone(name: str) -> None:
    made = party(name)
    kinds = {d["kind"]: d for d in made}
    assert kinds["Namespace"]["metadata"]["name"] == name
    assert {d["metadata"]["namespace"] for d in made if d["kind"] != "Namespace"} == {name}
    policies = {d["metadata"]["name"]: d["spec"] for d in made if d["kind"] == "NetworkPolicy"}
    default = policies.pop("own-namespace-only")
    assert (default["podSelector"], default["policyTypes"]) == ({}, ["Ingress", "Egress"])
    assert default["ingress"] == [{"from": [{"podSelector": {}}]}]
    to = [target for rule in default["egress"] for target in rule["to"]]
    assert all({"podSelector"} <= set(target) for target in to), "nothing but pods"
    for policy in policies.values():
        assert all(rule["from"] and rule["ports"] for rule in policy.get("ingress", ()))
    opened = [name for name, policy in policies.items() if policy.get("egress")]
    assert opened == (["autoscaler-to-kubernetes"] if name == "model-owner" else [])
