"""Papers are read off docstrings, settings are put in words, and both survive a file."""

import importlib
import inspect
import pkgutil
import platform
import re
from dataclasses import dataclass

import numpy
import torch

import smcdiff
import smcdiff as sd
from smcdiff.diagnostics.provenance import (
    describe,
    read_references,
    references,
    section,
    versions,
    write_references,
)
from smcdiff.smc.resampling import Multinomial, Systematic

DOC = """Something.

    References:
        A. One, B. Two-Three, "A title that
        runs on" (1999), arXiv 9901.00001: equation 3.
        C. D. Four, "Another" (2001).

    Args:
        x: not a paper.
"""


def test_entries_are_split_where_authors_begin():
    assert section(DOC) == [
        'A. One, B. Two-Three, "A title that runs on" (1999), arXiv 9901.00001: equation 3.',
        'C. D. Four, "Another" (2001).',
    ]
    assert section("No papers here.") == section("") == []


def test_every_entry_of_the_library_is_one_paper():
    number = 0
    for module in pkgutil.walk_packages(smcdiff.__path__, "smcdiff."):
        if ".adapters" in module.name or module.name.endswith("__main__"):
            continue
        here = importlib.import_module(module.name)
        classes = [c for c in vars(here).values() if inspect.isclass(c) and c.__module__ == module.name]
        for doc in (here.__doc__, *(c.__doc__ for c in classes)):
            for paper in section(doc or ""):
                number += 1
                assert re.search(r"\b(19|20)\d\d\b", paper), (module.name, paper)
                assert paper.count('"') in (0, 2), (module.name, paper)
    assert number > 20


def test_references_of_a_method_include_those_of_its_parts():
    papers = references(sd.TDS(lambda: None, sd.TweedieTwist()), sd.ParticleFilter(Systematic()))
    assert sum("2306.17775" in paper for paper in papers) == 1  # named by the method and by others, listed once
    assert any("Gordon" in paper for paper in papers) and any("Del Moral" in paper for paper in papers)
    own = set(section(inspect.getdoc(importlib.import_module("smcdiff.guidance.twists"))))
    titles = {re.search(r'"(.+?)"', paper)[1] for paper in papers}
    assert {re.search(r'"(.+?)"', paper)[1] for paper in own} <= titles
    assert references(3, "text") == []
    assert read_references(write_references(papers)) == papers


@dataclass(frozen=True)
class Inner:
    width: float = 0.5


@dataclass(frozen=True)
class Outer:
    model: object
    inner: Inner
    values: torch.Tensor


def test_a_method_in_words():
    assert describe(Outer(print, Inner(), torch.zeros(3, 4))) == "Outer(inner=Inner(width=0.5), values=tensor(3, 4))"
    assert describe(sd.TDS(lambda: None, sd.PointTwist(), 0.3)) == "TDS(twist=PointTwist(), max_shift=0.3)"
    assert describe(sd.ParticleFilter(Multinomial(), 1.0)).startswith("ParticleFilter(resampler=Multinomial(")
    assert describe(test_a_method_in_words) == "test_a_method_in_words"


def test_versions():
    found = versions()
    assert found["version of python"].startswith(platform.python_version())
    assert found["version of smcdiff"] == smcdiff.__version__
    assert found["version of numpy"] == numpy.__version__
    assert found["version of torch"].split("+")[0] == torch.__version__.split("+")[0]
