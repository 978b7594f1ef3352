"""The files of cluster/, held against the schemas and the code that will read them."""

import copy
import functools
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from processes import ROOT
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_config_of,
)
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema
from ray.util.accelerators import accelerators

from dlf_ray import Family
from dlf_ray.engine.capacity import Node, fits, limits
from dlf_ray.engine.placement import needs

CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
LAUNCHERS = ("aws", "gcp")
MANIFESTS = {"raycluster": "RayCluster", "rayservice": "RayService", "rayjob": "RayJob"}


def read(file):
    return yaml.safe_load(file.read_text())


def launcher(name):
    return prepare_config(read(CLUSTER / f"{name}.yaml"))


def manifest(name):
    return read(KUBERAY / f"{name}.yaml")


def cluster_spec(name):
    spec = manifest(name)["spec"]
    return spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec


def autoscaling_config(name):
    """What Ray's autoscaler makes of a file."""
    if name in LAUNCHERS:
        return launcher(name)
    cluster = {"metadata": {"name": "dlf", "namespace": "default"}, "spec": cluster_spec(name)}
    return autoscaling_config_of(cluster)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launcher_takes_its_files(name):
    config = launcher(name)
    validate_config(config)
    typo = copy.deepcopy(config)
    typo["available_node_types"]["small"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(typo)
    named = {v for k, v in vars(accelerators).items() if k.isupper() and isinstance(v, str)}
    for node_type in config["available_node_types"].values():
        for kind in node_type["resources"]:
            if kind.startswith("accelerator_type:"):
                assert kind.partition(":")[2] in named


def test_the_autoscaler_takes_the_local_file():
    validate_config(read(CLUSTER / "local.yaml"))  # as it is: there are no defaults for it


@pytest.mark.parametrize("name", [*LAUNCHERS, *MANIFESTS])
def test_the_sample_family_fits_each_cluster(name):
    config = autoscaling_config(name)
    head = config["available_node_types"][config["head_node_type"]]["resources"]
    capacity = limits(config, [Node(head, type=config["head_node_type"])])
    wanted = list(needs(Family.from_yaml(CLUSTER / "family.yaml")).values())
    large = config["available_node_types"]["large"]["max_workers"]  # one for each large model
    assert fits(wanted * large, capacity, "PACK")
    assert not fits(wanted * (large + 1), capacity, "PACK")


def strict(schema):
    """A custom resource's schema, with unknown fields refused as `kubectl --validate` does."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and not open_ended and "type" in schema:
        made.setdefault("additionalProperties", False)
    return made


@functools.cache
def validator(kind):
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("KUBERAY_CRDS names no folder with KubeRay's custom resource definitions")
    text = (Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text()
    definition = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]  # 1 MB, most of it of pods
    assert definition["group"] == "ray.io"
    [version] = [v for v in definition["versions"] if v["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def validate(name, content):
    assert content["apiVersion"] == "ray.io/v1"
    assert content["kind"] == MANIFESTS[name]
    validator(content["kind"]).validate(content)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_takes_the_manifests(name):
    validate(name, manifest(name))


def misspell(content):
    content["workerGroupSpec"] = content.pop("workerGroupSpecs")


def mistype(content):
    content["workerGroupSpecs"][0]["maxReplicas"] = "one"


def misplace(content):
    pod = content["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["readinessProbes"] = pod["containers"][0].pop("readinessProbe")


def misname(content):
    content["authOptions"]["mode"] = "tokens"


@pytest.mark.parametrize("mistake", [misspell, mistype, misplace, misname])
@pytest.mark.parametrize("name", MANIFESTS)
def test_a_mistake_in_a_manifest_would_be_found(name, mistake):
    content = manifest(name)
    spec = content["spec"]
    mistake(spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec)
    with pytest.raises(jsonschema.ValidationError):
        validate(name, content)


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_autoscaler_and_tokens_are_on_in_every_manifest(name):
    spec = cluster_spec(name)
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token"}
    assert [group["groupName"] for group in spec["workerGroupSpecs"]] == ["large", "small"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in pod["volumes"]
            if len(v) > 1 and "persistentVolumeClaim" in v
        ]
        assert claims == [read(KUBERAY / "models.yaml")["metadata"]["name"]]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert container["readinessProbe"]["httpGet"]
            assert container["livenessProbe"]["httpGet"]


def ports(group):
    [container] = group["template"]["spec"]["containers"]
    return {port["name"] for port in container["ports"]}


@pytest.mark.parametrize("name", MANIFESTS)
def test_prometheus_scrapes_ports_that_the_pods_have(name):
    spec = cluster_spec(name)
    groups = {"head": [spec["headGroupSpec"]], "worker": spec["workerGroupSpecs"]}
    monitors = list(yaml.safe_load_all((KUBERAY / "podmonitor.yaml").read_text()))
    for monitor in monitors:
        kind = monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"]
        scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
        assert "metrics" in scraped
        for group in groups.pop(kind):
            assert scraped <= ports(group)
    assert not groups


def test_serve_takes_its_file_and_kubernetes_has_the_same():
    config = read(CLUSTER / "serve.yaml")
    ServeDeploySchema.model_validate(config)
    with pytest.raises(ValueError, match="import_path"):
        ServeDeploySchema.model_validate(
            {"applications": [{"name": "dlf", "import_paths": "dlf_ray.serving.app:build_app"}]}
        )
    assert yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"]) == config


def test_the_image_has_what_it_copies():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:] for line in lines if line.startswith("COPY")]
    assert copies
    for words in copies:
        *sources, _ = [word for word in words if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
    copied = " ".join(source for words in copies for source in words)
    assert "dlf_ray" in copied
    entrypoint = manifest("rayjob")["spec"]["entrypoint"].split()[1]
    [folder] = [line.split()[1] for line in lines if line.startswith("WORKDIR")]
    assert (ROOT / Path(entrypoint).relative_to(folder)).exists()


def test_one_version_of_ray_and_python_everywhere():
    [ray] = re.findall(r"^ray==(.+)$", (ROOT / ".ci/constraints.txt").read_text(), re.M)
    texts = [path.read_text() for path in CLUSTER.rglob("*") if path.is_file()]
    tags = [tag for text in texts for tag in re.findall(r"rayproject/ray:(\S+)", text)]
    versions = [found for text in texts for found in re.findall(r'rayVersion: "(.+)"', text)]
    assert len(tags) >= 5
    assert all(tag.startswith(f"{ray}-py311") for tag in tags)
    assert versions == [ray] * 3
