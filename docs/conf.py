"""Sphinx configuration: ``sphinx-build docs docs/_build``."""

project = "smcdiff"
copyright = "2026, the smcdiff developers"
extensions = ["myst_nb"]
html_theme = "furo"
nb_execution_mode = "off"
