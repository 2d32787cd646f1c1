"""The import rules: arrows only downward, and light to import.

The table below is the architecture of docs/design.md. Imports inside functions and for type checking count as well: an
arrow is an arrow wherever it is drawn.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "smcdiff"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: What a program with a diffusion prior is made of.
CORE = {
    "smc",
    "diffusion",
    "measurement",
    "guidance",
    "diagnostics",
    "infer",
    "moves",
    "state_space",
    "validation",
    "zoo",
}

#: Which part of the library may import which.
PARTS: dict[str, set[str]] = {
    "transforms": set(),
    "smc": set(),
    "diffusion": {"transforms"},
    "measurement": {"transforms"},
    "training": set(),
    "zoo": {"diffusion"},
    "guidance": {"transforms", "smc", "diffusion", "measurement"},
    "diagnostics": {"smc"},
    "infer": {"smc", "diffusion", "measurement", "guidance", "diagnostics"},
    "moves": {"smc", "diffusion", "measurement", "guidance", "diagnostics", "infer"},
    "state_space": {"smc"},
    "validation": {"smc", "diffusion", "measurement", "guidance", "diagnostics", "infer"},
    "__init__": CORE,
    "restoration": CORE,
    "cli": CORE | {"restoration"},
}

#: Other people's libraries, where not every module may import them: the modules or folders that may.
LIBRARIES: dict[str, tuple[str, ...]] = {
    "arviz": ("diagnostics/arviz.py",),
    "xarray": ("diagnostics/arviz.py",),
    "matplotlib": ("diagnostics/plots/", "diagnostics/page.py", "diagnostics/report.py", "restoration/report.py"),
    "diffusers": ("diffusion/adapters/",),
    "safetensors": ("diffusion/adapters/",),
    "PIL": ("restoration/images.py",),
    "tqdm": (
        "diffusion/calibration.py",
        "diffusion/variance_head.py",
        "infer.py",
        "moves.py",
        "training.py",
        "validation/study.py",
        "cli.py",
    ),
    "numpy": (
        "diffusion/",
        "diagnostics/",
        "zoo/",
        "restoration/",
        "measurement/psf.py",
        "guidance/marginal_nodes.py",
    ),
    "pyro": (
        "diffusion/",
        "measurement/",
        "guidance/",
        "infer.py",
        "moves.py",
        "state_space.py",
        "validation/",
        "restoration/acquisition.py",
    ),
    "torch": ("",),
}


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The modules that a source file of ``package`` names in its import statements, as tuples of their parts."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


def violations(path: str, source: str) -> list[str]:
    """What the module at ``path``, relative to the package, imports against the rules."""
    folders = Path(path).parent.parts
    here = folders[0] if folders else Path(path).stem
    found = []
    for name in imports(source, ("smcdiff", *folders)):
        library, inner = name[0], name[1] if len(name) > 1 else ""
        if library == "smcdiff":
            if (
                inner != here
                and inner not in PARTS.get(here, set())
                and not (here == "__init__" and inner == "__version__")
            ):
                found.append(f"{path} imports {'.'.join(name)}: {here} may import {sorted(PARTS.get(here, set()))}")
        elif library not in sys.stdlib_module_names and not path.startswith(LIBRARIES.get(library, ())):
            found.append(f"{path} imports {library}: only {LIBRARIES.get(library, ())} may")
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_downward(module: Path) -> None:
    assert not violations(module.relative_to(PACKAGE).as_posix(), module.read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("smc/weights.py", "import numpy as np"),
        ("smc/weights.py", "def f():\n    from pyro import sample"),
        ("smc/weights.py", "from smcdiff.diffusion import prior"),
        ("diffusion/prior.py", "from smcdiff import guidance"),
        ("diffusion/prior.py", "from ..measurement import operators"),
        ("diffusion/adapters/edm.py", "from ...smc.weights import normalise"),
        ("measurement/operators.py", "import smcdiff.diffusion.prior as prior"),
        ("diagnostics/plots/runs.py", "import arviz"),
        ("guidance/tds.py", "import matplotlib.pyplot as plt"),
        ("infer.py", "from smcdiff.cli import main"),
        ("infer.py", "import somebody_elses_library"),
    ],
)
def test_an_arrow_that_points_upward_is_seen(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("smc/weights.py", "import math\nimport torch.nn.functional\nfrom .records import Records"),
        ("diffusion/adapters/edm.py", "from ..schedule import VESchedule\nfrom .diffusers import SpaceToDepth"),
        ("guidance/tds.py", "from smcdiff.smc.feynman_kac import Move\nfrom smcdiff.guidance.base import Step"),
        ("diagnostics/arviz.py", "import arviz\nimport xarray as xr"),
        ("infer.py", "def f():\n    from smcdiff.diagnostics.arviz import groups"),
    ],
)
def test_an_arrow_that_points_downward_may_be_drawn(path: str, source: str) -> None:
    assert violations(path, source) == []


def test_every_part_of_the_library_is_in_the_table() -> None:
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES}
    assert parts <= PARTS.keys()


def test_importing_the_library_imports_no_heavy_one() -> None:
    heavy = ["arviz", "xarray", "matplotlib", "diffusers", "skimage", "scipy", "PIL"]
    command = f"import sys, smcdiff; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("folder", ["smcdiff", "tests", "benchmarks", "examples"])
def test_files_are_small(folder: str) -> None:
    large = {str(path): path.stat().st_size for path in (ROOT / folder).rglob("*.py") if path.stat().st_size >= 24_000}
    assert not large
