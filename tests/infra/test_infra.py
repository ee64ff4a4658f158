"""What can be known of the cluster files without a cluster: they parse, name real flags, hold no secrets."""

import re
import subprocess
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

INFRA = Path(__file__).parents[2] / "infra"
TEXTS = {path.name: path.read_text() for path in INFRA.iterdir() if path.is_file()}


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries that Ray imports


def load(name: str) -> Any:
    return yaml.safe_load(TEXTS[name])


def ray_flags(command: str) -> set[str]:
    """The options that `ray COMMAND --help` lists."""
    found: Any = import_module("ray.scripts.scripts").cli
    for name in command.split():
        found = found.commands[name]
    return {flag for parameter in found.params for flag in parameter.opts}


def mlflow_flags() -> set[str]:
    """The options that MLflow's command line defines, from its source: importing it takes long."""
    root = Path(str(find_spec("mlflow").origin)).parent
    source = (root / "cli" / "__init__.py").read_text() + (root / "utils" / "cli_args.py").read_text()
    return set(re.findall(r'"(--[a-z][\w-]+)"', source))


def flags_after(command: str) -> set[str]:
    """The long options given to `command`, a pattern, anywhere in infra/, up to the end of the line or a bare --."""
    calls = [call for text in TEXTS.values() for call in re.findall(rf"(?:{command})([^\n`]*)", text)]
    assert calls, f"no file calls {command}"
    return {flag for call in calls for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", call.split(" -- ")[0])}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return load("kuberay.yaml")["spec"]


def containers(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_kuberay_has_a_head_gpus_and_machines_for_data(cluster: dict[str, Any]) -> None:
    assert load("kuberay.yaml")["apiVersion"] == "ray.io/v1" and load("kuberay.yaml")["kind"] == "RayCluster"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    gpus = {g["groupName"]: "nvidia.com/gpu" in str(g["template"]) for g in cluster["workerGroupSpecs"]}
    assert gpus == {"gpu": True, "data": False}
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["volumes"][0]["name"] == "shm"


def test_kuberay_runs_every_container_with_a_token_and_not_as_root(cluster: dict[str, Any]) -> None:
    for environment in [cluster["autoscalerOptions"]["env"], *(container["env"] for container in containers(cluster))]:
        named = {variable["name"]: variable for variable in environment}
        assert named["RAY_AUTH_MODE"]["value"] == "token"
        assert named["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["key"] == "auth_token"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]


def test_kuberay_names_the_ray_that_is_installed(cluster: dict[str, Any]) -> None:
    assert cluster["rayVersion"] == version("ray")


def test_ray_up_passes_rays_own_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load("ray-up.yaml")))
    commands = load("ray-up.yaml")["head_start_ray_commands"] + load("ray-up.yaml")["worker_start_ray_commands"]
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in commands)


def test_every_flag_of_ray_start_is_one(cluster: dict[str, Any]) -> None:
    used = flags_after(r"ray start |start_ray |resources=\(")
    assert {"--head", "--block", "--num-gpus", "--autoscaling-config"} <= used
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert used | {f"--{name}" for group in groups for name in group["rayStartParams"]} <= ray_flags("start")


@pytest.mark.parametrize("command", ["job submit", "job list"])
def test_every_flag_of_ray_job_is_one(command: str) -> None:
    assert flags_after(f"ray {command} ") <= ray_flags(command)


def test_slurm_script_is_bash_and_refuses_an_empty_command() -> None:
    subprocess.run(["bash", "-n", INFRA / "slurm.sh"], check=True)
    answer = subprocess.run(["bash", INFRA / "slurm.sh"], check=False, capture_output=True, text=True)
    assert answer.returncode == 2 and "usage" in answer.stderr


def test_compose_listens_on_loopback_and_takes_passwords_from_outside() -> None:
    services = load("compose.yaml")["services"]
    assert set(services) == {"mlflow", "prometheus", "grafana"}
    assert "--app-name basic-auth" in services["mlflow"]["command"]
    assert set(re.findall(r"--[a-z][\w-]+", services["mlflow"]["command"])) <= mlflow_flags()
    assert "--host ${BIND:-127.0.0.1}" in services["mlflow"]["command"]
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "${BIND:-127.0.0.1}"
    for service in services.values():
        secrets = {
            name: value for name, value in service.get("environment", {}).items() if re.search("PASSWORD|SECRET", name)
        }
        assert all(re.fullmatch(r"\$\{\w+:\?set it\}", value) for value in secrets.values()), secrets
    for inner in load("compose.yaml")["configs"].values():
        yaml.safe_load(inner["content"])


def test_nothing_in_infra_holds_a_secret_or_listens_on_all_interfaces() -> None:
    for name, text in TEXTS.items():
        assert not re.search(r"(?i)(password|token|secret)[\"']?\s*[:=]\s*[\"']?[\w+/]{12,}", text), name
        assert not re.search(r"(host|ADDR|address)[=: ]+0\.0\.0\.0", text), name


def test_image_runs_as_a_user_and_keeps_to_the_pinned_versions() -> None:
    lines = TEXTS["Dockerfile"].splitlines()
    assert "USER t2v" in lines
    installs = [line for line in lines if "uv pip install" in line and "--no-deps" not in line]
    assert installs and all("--constraint constraints.txt" in line for line in installs)
