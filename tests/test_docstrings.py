"""Docstrings, which are plain text, become reStructuredText that means the same."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import smcdiff as sd


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    path = Path(__file__).parent.parent / "docs" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DOC = r"""A step of the chain, |r|_2 and x_ in ``x_t * y_``; see :class:`sd.SMC`.

    q = N(mean_p - zeta grad |y - A(x0_hat)|, var_p)    (eq. *)

exact                  always
for one particle       never

- first,
  its second line;
- second.

Args:
    x: (m, *event), of the chain_.

References:
    L. Wu, B. Trippe, "One * paper" (2023), arXiv 2306.17775: its
    second line.
    A. Author, "Another" (2024).

L. Wu begins this paragraph."""

RST = r"""A step of the chain, \|r\|_2 and x\_ in ``x_t * y_``; see :class:`sd.SMC`.

.. code-block:: text

    q = N(mean_p - zeta grad |y - A(x0_hat)|, var_p)    (eq. *)

.. code-block:: text

    exact                  always
    for one particle       never

- first,
  its second line;
- second.

Args:
    x: (m, \*event), of the chain\_.

.. rubric:: References

- \L. Wu, B. Trippe, "One \* paper" (2023), arXiv 2306.17775: its second line.
- \A. Author, "Another" (2024).


\L. Wu begins this paragraph."""


def test_formulas_signs_and_references(docstrings: ModuleType) -> None:
    assert "\n".join(docstrings.to_rst(DOC.splitlines())) == RST


def test_code_after_two_colons_stays_code(docstrings: ModuleType) -> None:
    lines = ["Use it so::", "", "    f(*x)", "", "and | so."]
    assert docstrings.to_rst(lines) == ["Use it so::", "", "    f(*x)", "", r"and \| so."]


def test_signatures_are_short(docstrings: ModuleType) -> None:
    found = docstrings._signature(None, "class", "X", None, None, "(a: ~typing.Any = <factory>, b: int = 1)", None)
    assert found == ("(a: Any = ..., b: int = 1)", None)
    assert docstrings._signature(None, "class", "P", None, None, "(*args, **kwargs)", None) == ("", None)


def test_no_word_of_a_docstring_is_lost(docstrings: ModuleType) -> None:
    for name in sd.__all__:
        doc = inspect.getdoc(getattr(sd, name)) or ""
        rst = "\n".join(docstrings.to_rst(doc.splitlines()))
        plain = rst.replace(".. code-block:: text", "").replace(".. rubric:: References", "References:")
        words = [word for word in plain.replace("\\", "").split() if word != "-"]
        assert words == [word for word in doc.replace("\\", "").split() if word != "-"], name
