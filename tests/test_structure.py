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
    "distributed",
    "ssm",
    "hippo",
    "recurrence",
    "layers",
    "model",
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
    "training_log",
    "benchmark",
    "quality_benchmark",
    "sampling",
    "simd",
    "stepper",
    "engine",
    "states",
    "request",
    "recipe",
    "pipeline",
    "scheduler",
    "sampling_benchmark",
    "inspection",
    "notes",
    "sample_quality",
    "files",
    "sheets",
    "bulk",
    "train",
    "training_report",
    "cli",
    "__main__",
)
PACKAGE = Path(genssm.__file__).parent


def test_every_module_has_its_place() -> None:
    modules = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_modules_import_only_from_below(module: str) -> None:
    imported = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "genssm":
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("genssm."):
            imported.add(str(node.module).split(".")[1])
    above = imported - set(ORDER[: ORDER.index(module)])
    assert not above, f"{module} imports {above}, which stand above it"


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_does_not_import_torch() -> None:
    assert run("import sys, genssm, genssm.cli; print('torch' in sys.modules)") == "False\n"


def test_public_names_are_found_on_first_use() -> None:
    assert run("import genssm; print([hasattr(genssm, n) for n in genssm.__all__])") == (
        f"{[True] * len(genssm.__all__)}\n"
    )
    assert run("import genssm; print(genssm.hippo.legs(1)[0].item())") == "-1.0\n"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = genssm.nonsense


def test_nothing_is_unpickled() -> None:
    for file in PACKAGE.glob("*.py"):
        text = file.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", "").replace("is pickled", "")
        assert "torch.load" not in text
        assert "torch.save" not in text
