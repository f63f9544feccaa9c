"""Files for deployment: manifests by their schemas, the unit by systemd, the Dockerfiles by running their steps."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="reading manifests needs pyyaml of the dev extra")
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
# Of ray.io/v1 RayService, the fields in use: what the operator's own schema says of them.
POD = {
    "type": "object",
    "required": ["spec"],
    "properties": {"spec": {"type": "object"}},
    "additionalProperties": False,
}
PARAMETERS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
GROUP = {
    "type": "object",
    "required": ["groupName", "rayStartParams", "template"],
    "properties": {
        "groupName": {"type": "string"}, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
        "rayStartParams": PARAMETERS, "template": POD,
    },
    "additionalProperties": False,
}  # fmt: skip
HEAD = {
    "type": "object",
    "required": ["template"],
    "properties": {"rayStartParams": PARAMETERS, "template": POD},
    "additionalProperties": False,
}
CLUSTER = {
    "type": "object",
    "required": ["headGroupSpec"],
    "properties": {
        "rayVersion": {"type": "string"}, "enableInTreeAutoscaling": {"type": "boolean"}, "headGroupSpec": HEAD,
        "workerGroupSpecs": {"type": "array", "items": GROUP},
    },
    "additionalProperties": False,
}  # fmt: skip
RAY_SERVICE = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["serveConfigV2", "rayClusterConfig"],
            "properties": {"serveConfigV2": {"type": "string"}, "rayClusterConfig": CLUSTER},
            "additionalProperties": False,
        },
    },
    "additionalProperties": False,
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def check_kubernetes(document: dict[str, Any]) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas come with the dev extra")
    kubernetes.validate(document, kubernetes.latest_version(), strict=True)


def ray_service() -> dict[str, Any]:
    (found,) = documents("rayservice.yaml")
    return found


def pods() -> list[dict[str, Any]]:
    cluster = ray_service()["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("index", range(3))
def test_kubernetes_manifest(index: int) -> None:
    check_kubernetes(documents("kubernetes.yaml")[index])


def test_kubernetes_manifest_is_one_whole() -> None:
    """Names that must agree do, and a pod's end leaves the server its time."""
    deployment, service, budget = documents("kubernetes.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels.items()
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {p["name"] for p in container["ports"]} >= {service["spec"]["ports"][0]["targetPort"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    arguments = container["args"]
    assert float(arguments[arguments.index("--grace") + 1]) < pod["terminationGracePeriodSeconds"]
    from mindomni_rt.commands import Parser
    from mindomni_rt.serving import server

    parser = Parser()
    server.add_arguments(parser)
    assert parser.parse_args(arguments).model == "/model"


def test_ray_service_manifest() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="checking by a schema needs jsonschema, which Ray brings")
    jsonschema.validate(ray_service(), RAY_SERVICE)
    for pod in pods():
        check_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod})
        mounts = {m["name"] for c in pod["containers"] for m in c.get("volumeMounts", ())}
        assert mounts == {v["name"] for v in pod.get("volumes", ())}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**ray_service(), "spec": {"serveConfigV2": ""}}, RAY_SERVICE)


def test_ray_serve_configuration() -> None:
    """By Ray's own schema, and by the function that it names."""
    pytest.importorskip("ray", reason="replicas need the extra ray")
    from ray.serve.schema import ServeDeploySchema

    from mindomni_rt.errors import BadRequestError
    from mindomni_rt.serving.ray_serve import configured

    found = ServeDeploySchema.model_validate(yaml.safe_load(ray_service()["spec"]["serveConfigV2"]))
    (application,) = found.applications
    assert application.import_path == f"{configured.__module__}:configured"
    assert type(configured(application.args)).__name__ == "Application"
    for wrong in ({}, {"model": "x", "modle": 1}, {"model": "x", "settings": {"api_key": "k"}}):
        with pytest.raises(BadRequestError):
            configured(wrong)


def test_systemd_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze on this machine")
    program = tmp_path / "mindomni"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = (DEPLOY / "mindomni.service").read_text(encoding="utf-8")
    copy = tmp_path / "mindomni.service"
    copy.write_text(unit.replace("/opt/mindomni/venv/bin/mindomni", str(program)), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "mindomni.service" not in done.stderr, done.stderr


def steps(name: str) -> list[tuple[str, str, bool]]:
    spec = importlib.util.spec_from_file_location("run_steps", DEPLOY / "run_steps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.steps(DEPLOY / name))


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.gpu"])
def test_dockerfiles(name: str) -> None:
    """Every file that is copied exists, all packages are among them, and the image runs without rights."""
    found = steps(name)
    words = [word for word, _, _ in found]
    assert words[0] == "FROM" and words.index("USER") < words.index("ENTRYPOINT")
    assert {w: r for w, r, _ in found}["USER"] == "10001"
    copied = [source for word, rest, _ in found if word == "COPY" for source in rest.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)
    assert {"mindomni_rt", "export", "kernels", "training", "benchmarks", "serving"} <= set(copied)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_steps_of_the_cpu_image_work(tmp_path: Path) -> None:
    """Installed from the copied files into a folder of its own; the server answers its health check and stops."""
    command = [
        sys.executable,
        str(DEPLOY / "run_steps.py"),
        str(DEPLOY / "Dockerfile.cpu"),
        "--into",
        str(tmp_path / "app"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not run here: RUN useradd" in done.stdout and "healthy, and stopped in order" in done.stdout
