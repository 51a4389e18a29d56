"""Rules of the house that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import clvq
import pytest

ROOT = Path(clvq.__file__).parent
PARTS = (
    "cache",
    "cache.sharing",
    "pipeline",
    "trainer",
    "evaluation",
    "evaluation.judges",
    "evaluation.study",
    "explorer",
)
FILES = sorted([*ROOT.glob("*.py"), *(file for part in PARTS for file in (ROOT / part.replace(".", "/")).glob("*.py"))])
# The command: it alone talks to a person, and may import everything.
COMMAND = (
    "cli",
    "cli_ablate",
    "cli_cache",
    "cli_explore",
    "cli_export",
    "cli_extract",
    "cli_judge",
    "cli_quality",
    "cli_rationales",
    "cli_report",
    "cli_study",
    "cli_train",
    "options",
    "terminal",
)
# Everyone may import these.
COMMON = ("attention", "errors", "progress")
# Who may import whom.
ALLOWED = {
    "cache": {"cache"},
    "pipeline": {"pipeline", "cache"},
    "trainer": {"trainer", "cache"},
    "evaluation": {"evaluation", "trainer", "cache", "pipeline.language_model"},
    "explorer": {"explorer", "evaluation", "trainer", "cache", "pipeline.language_model"},
    "demo": {"cache", "pipeline", "trainer", "evaluation"},
    **{name: set() for name in COMMON},
    "__init__": {"cache"},
}


def _imports(file: Path) -> list[str]:
    """Modules of the package that a file imports, as dotted names from the package's root."""
    here = file.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level]
            module = node.module.split(".") if node.module else []
            found += [".".join([*base, *module])] if module else [".".join([*base, name.name]) for name in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_part_imports_only_what_it_may(file: Path):
    part = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if part in COMMAND:
        return
    for module in _imports(file):
        if module in COMMON:
            continue
        assert any(module == name or module.startswith(f"{name}.") for name in ALLOWED[part]), module


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_command_prints(file: Path):
    if file.relative_to(ROOT).parts[0].removesuffix(".py") in COMMAND:
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(name.split(".")[0] in ("rich", "typer") for name in names)
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(file: Path):
    assert file.stat().st_size <= 25_600


def test_importing_the_package_loads_no_model_library_and_prints_nothing():
    code = (
        "import sys, clvq; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'datasets', 'rich')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_the_public_names_are_these():
    assert {name for name in vars(clvq) if not name.startswith("_")} - set(PARTS) <= {
        "Cache", "ClvqError", "demo", *COMMON, *COMMAND,
    }  # fmt: skip
    assert {"Cache", "ClvqError", "__version__"} <= set(vars(clvq))


def test_every_package_folder_is_installed():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(project["tool"]["setuptools"]["packages"]) == {"clvq", *(f"clvq.{part}" for part in PARTS)}


def test_the_lock_pins_names_and_versions_only():
    import re

    for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line
