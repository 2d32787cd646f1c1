"""The README and the pages of docs do what they say.

The Python blocks of a page are run in order, as a reader would, and what they print is held against the text block that
follows. The numbers of the README's first program are held against the exact answer. Pages that are notebooks are run
when the site is built (``.ci/run``), and hold their numbers against exact answers themselves. The reference names all
that is public.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
import pkgutil
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

import smcdiff as sd

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts)]
BLOCK = re.compile(r"^```([^\s`]*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page."""
    return BLOCK.findall(page.read_text())


def run(page: Path) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Run the Python blocks of a page; its names, and (printed, what the page shows) wherever it shows a text block."""
    names: dict[str, Any] = {}
    printed, shown = "", []
    for language, text in blocks(page):
        if language == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(text, str(page), "exec"), names)
            printed = out.getvalue()
        elif language == "text" and printed:
            shown.append((printed, text))
            printed = ""
    return names, shown


@pytest.fixture(scope="module")
def readme() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    with torch.random.fork_rng():
        return run(ROOT / "README.md")


@dataclass(frozen=True)
class Exact:
    """The posterior of x ~ N(0, C), sigma ~ LogNormal(-2, 0.5), y ~ N(A x, sigma^2 I); log sigma summed over a grid."""

    log_z: float
    sigma_mean: float
    sigma_sd: float
    x_mean: Tensor

    @classmethod
    def of(cls, A: Tensor, C: Tensor, y: Tensor) -> Exact:
        log_sigma = torch.linspace(-6, 2, 801, dtype=torch.float64)
        V = A @ C @ A.T + (2 * log_sigma).exp()[:, None, None] * torch.eye(len(A), dtype=torch.float64)
        log_joint = MultivariateNormal(torch.zeros_like(y), V).log_prob(y) + Normal(-2.0, 0.5).log_prob(log_sigma)
        w, sigma = log_joint.softmax(0), log_sigma.exp()
        mean = (w * sigma).sum()
        return cls(
            log_z=float(log_joint.logsumexp(0)) + math.log(float(log_sigma[1] - log_sigma[0])),
            sigma_mean=float(mean),
            sigma_sd=float((w * (sigma - mean) ** 2).sum().sqrt()),
            x_mean=w @ (torch.linalg.solve(V, y.expand(len(w), -1)) @ A @ C),
        )


def test_the_first_program_gives_the_exact_answer(readme: tuple[dict[str, Any], list[tuple[str, str]]]) -> None:
    names, _ = readme
    C, y = names["covariance"].double(), names["y"].double().flatten()
    A = torch.stack([names["blur"](pixel).flatten() for pixel in torch.eye(25).reshape(25, 1, 5, 5)], 1).double()
    exact, sharp = Exact.of(A, C, y), Exact.of(torch.eye(25, dtype=torch.float64), C, y)
    # What the README says in words.
    words = f"sigma = {exact.sigma_mean:.3f} ± {exact.sigma_sd:.3f} and log-evidence {exact.log_z:.2f}"
    assert words in " ".join((ROOT / "README.md").read_text().split())
    # What the run says. The seed is fixed; the limits are five standard errors or more of the log-evidence, about 0.2
    # nats a run, and of averages over some hundred independent draws among the 1024.
    sigma, x = names["draws"]["sigma"], names["draws"]["x"].double()
    assert float(names["smc"].log_evidence) == pytest.approx(exact.log_z, abs=1.0)
    assert float(names["log_bayes_factor"]) == pytest.approx(exact.log_z - sharp.log_z, abs=1.5)
    assert float(sigma.mean()) == pytest.approx(exact.sigma_mean, abs=0.5 * exact.sigma_sd)
    assert float(sigma.std()) == pytest.approx(exact.sigma_sd, rel=0.35)
    assert torch.allclose(x.mean(0).flatten(), exact.x_mean, rtol=0, atol=0.12)


def test_the_readme_shows_what_is_printed(readme: tuple[dict[str, Any], list[tuple[str, str]]]) -> None:
    """The words agree; the numbers are those of one machine, and are held against the exact answer above."""
    _, shown = readme
    assert len(shown) == 2
    for printed, text in shown:
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", text).split()


@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if "python" in dict(blocks(page))], ids=lambda page: page.name
)
def test_the_pages_of_docs_run(page: Path) -> None:
    for printed, text in run(page)[1]:
        assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", text).split()


def test_the_readme_has_two_commands() -> None:
    commands = [text.strip() for language, text in blocks(ROOT / "README.md") if language == "bash"]
    assert [command.split("/")[-1] for command in commands] == ["smcdiff demo", "pytest"]
    assert all("\n" not in command and "-c constraints.txt" in command for command in commands)


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{sd.__version__}"' in project


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text())
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
    for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", prose):
        assert (page.parent / f"{target}.md").exists(), f"{page.name} links to {target}, which is not there"


def test_the_site_lists_its_pages() -> None:
    docs = ROOT / "docs"
    contents = "".join(text for language, text in blocks(docs / "index.md") if language == "{toctree}")
    listed = {line for line in contents.splitlines() if line and not line.startswith(":")}
    assert listed == {page.relative_to(docs).with_suffix("").as_posix() for page in PAGES[1:]} - {"index"}


PACKAGES = [
    "smcdiff",
    "smcdiff.smc",
    "smcdiff.measurement",
    "smcdiff.diagnostics",
    "smcdiff.diagnostics.plots",
    "smcdiff.validation",
    "smcdiff.zoo",
]


def test_the_reference_has_all_that_is_public() -> None:
    text = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"^\.\. auto(?:class|function|exception):: (\S+)$", text, re.MULTILINE)
    documented = [pkgutil.resolve_name(entry) for entry in entries]
    assert len(set(entries)) == len(entries)
    for package in map(importlib.import_module, PACKAGES):
        for name in package.__all__:
            value = getattr(package, name)
            if isinstance(value, type) or inspect.isfunction(value):
                assert value in documented, f"docs/api has no {package.__name__}.{name}"
