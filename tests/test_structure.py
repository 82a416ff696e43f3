"""The house: modules import only from those below them, and imports have no weight or effect."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import genssm

# From the ground up. A module may import from those before it.
ORDER = (
    "settings",
    "terminal",
    "startup",
    "disk",
    "folders",
    "distributed",
    "ssm",
    "hippo",
    "recurrence",
    "layers",
    "recall",
    "blocks",
    "heads",
    "config",
    "inputs",
    "model",
    "finite",
    "conversion",
    "codec",
    "data",
    "sources",
    "batches",
    "checkpoint",
    "classifier",
    "evaluate",
    "optim",
    "recipes",
    "token_cache",
    "preparation",
    "update",
    "training_state",
    "benchmark",
    "quality_benchmark",
    "sampling",
    "stepping",
    "threads",
    "pool",
    "pace",
    "simd",
    "memory",
    "program",
    "cuda",
    "stepper",
    "engine",
    "states",
    "request",
    "provenance",
    "session",
    "pipeline",
    "scheduler",
    "sampling_benchmark",
    "cuda_benchmark",
    "inspection",
    "notes",
    "sample_quality",
    "files",
    "sheets",
    "training_log",
    "bulk",
    "train",
    "training_report",
    "anatomy",
    "interface",
    "app_benchmark",
    "commands",
    "cli",
    "__main__",
)
# The modules of the command line and of the page, from the ground up.
COMMANDS = ("console", "sample", "training", "measuring", "page", "benchmarks")
INTERFACE = (
    "growth",
    "uploads",
    "offline",
    "bodies",
    "theme",
    "house",
    "courtesy",
    "components",
    "write",
    "draw",
    "speak",
    "inside",
    "page",
    "serving",
)
PARTS = {"commands": COMMANDS, "interface": INTERFACE}
PACKAGE = Path(genssm.__file__).parent


def imports(file: Path, package: str) -> set[str]:
    """The modules of a package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {n.removeprefix(f"{package}.").split(".")[0] for n in names
                      if n.startswith(f"{package}.")}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            found.add(str(node.module).removeprefix(f"{package}.").split(".")[0])
    return found


def test_no_import_is_relative() -> None:
    for file in PACKAGE.rglob("*.py"):
        nodes = ast.walk(ast.parse(file.read_text()))
        assert not any(isinstance(n, ast.ImportFrom) and n.level for n in nodes), file


def test_every_module_has_its_place() -> None:
    packages = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules | packages == set(ORDER)
    for package, inside in PARTS.items():
        modules = {p.stem for p in (PACKAGE / package).glob("*.py")} - {"__init__"}
        assert modules == set(inside)


@pytest.mark.parametrize("module", ORDER)
def test_modules_import_only_from_below(module: str) -> None:
    package = PACKAGE / module
    files = package.glob("*.py") if package.is_dir() else [PACKAGE / f"{module}.py"]
    imported = {name for file in files for name in imports(file, "genssm")}
    above = imported - set(ORDER[: ORDER.index(module)]) - {module}
    assert not above, f"{module} imports {above}, which stand above it"


@pytest.mark.parametrize(
    ("package", "module"), [(package, module) for package in PARTS for module in PARTS[package]]
)
def test_modules_of_a_part_import_only_from_below(package: str, module: str) -> None:
    imported = imports(PACKAGE / package / f"{module}.py", f"genssm.{package}")
    above = imported - set(PARTS[package][: PARTS[package].index(module)])
    assert not above, f"{package}.{module} imports {above}, which stand above it"


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_does_not_import_torch() -> None:
    assert run("import sys, genssm, genssm.cli; print('torch' in sys.modules)") == "False\n"


def test_listing_the_shipped_models_does_not_import_torch() -> None:
    code = "from genssm.commands.measuring import models; models(); print('torch' in sys.modules)"
    assert run(f"import sys; {code}").splitlines()[-1] == "False"


def test_the_sampling_loop_is_compiled_before_gradio_is_imported() -> None:
    code = "import sys, genssm.interface.house; print('gradio' in sys.modules)"
    assert run(code) == "False\n"


def test_public_names_are_found_on_first_use() -> None:
    assert run("import genssm; print([hasattr(genssm, n) for n in genssm.__all__])") == (
        f"{[True] * len(genssm.__all__)}\n"
    )
    assert run("import genssm; print(genssm.hippo.legs(1)[0].item())") == "-1.0\n"
    assert run("import genssm; print({*genssm.__all__, 'hippo', 'ssm'} <= {*dir(genssm)})") == (
        "True\n"
    )
    assert run("from genssm import S4, S4D, LSSL; print(S4.__module__)") == "genssm.layers\n"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = genssm.nonsense


def test_nothing_is_unpickled() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", "").replace("is pickled", "")
        assert "torch.load" not in text
        assert "torch.save" not in text
