"""Imports run one way, jobs -> pipelines -> t2v, and third parties keep to one room each."""

import ast
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parents[1]
FOLDERS = {  # what each may import of the others
    "t2v": {"t2v"},
    "pipelines": {"pipelines", "t2v"},
    "dashboards": {"dashboards", "pipelines", "t2v"},
    "jobs": {"jobs", "dashboards", "pipelines", "t2v"},
}
ROOMS = {
    "deepspeed": {"t2v/engine.py"},
    "mlflow": {"t2v/record.py"},
    "ray.train": {"t2v/worker.py"},
    "diffusers": {"t2v/frozen.py", "t2v/export.py", "pipelines/nano_vae.py"},
    "open_clip": {"t2v/frozen.py"},
    "peft": {"t2v/lora.py"},
    "transformers": {"t2v/standins.py"},  # CLIPTextModel folders are read and written without it
}
CONFIGURATION = ("t2v/config.py", "pipelines/config.py", "jobs/config.py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def sources() -> Iterator[tuple[str, set[str]]]:
    for folder in FOLDERS:
        for path in sorted((PROJECT / folder).rglob("*.py")):
            yield str(path.relative_to(PROJECT)), set(imports(path))


def test_imports_run_one_way() -> None:
    wrong = [
        f"{name} imports {module}"
        for name, modules in sources()
        for module in sorted(modules)
        if (first := module.split(".")[0]) in FOLDERS and first not in FOLDERS[name.split("/")[0]]
    ]
    assert not wrong


def test_third_parties_keep_to_their_rooms() -> None:
    wrong = [
        f"{name} imports {party}"
        for name, modules in sources()
        for party, rooms in ROOMS.items()
        if name not in rooms and any(module == party or module.startswith(f"{party}.") for module in modules)
    ]
    assert not wrong


def test_configuration_is_light() -> None:
    heavy = {"torch", "ray", "numpy", "mlflow", "diffusers", "av", "cv2"}
    light = {name: modules for name, modules in sources() if name in CONFIGURATION}
    assert len(light) == len(CONFIGURATION)
    assert not {module.split(".")[0] for modules in light.values() for module in modules} & heavy


def test_no_file_and_no_function_grows_beyond_reading() -> None:
    for folder in FOLDERS:
        for path in (PROJECT / folder).rglob("*.py"):
            text = path.read_text()
            assert len(text.splitlines()) <= 400, f"{path} is too long"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    assert length <= 60, f"{path}: {node.name} has {length} lines"
