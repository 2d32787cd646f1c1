"""Sphinx configuration: ``sphinx-build -W -j auto docs docs/_build``.

The pages that are notebooks are run at every build; an error in one, or a warning that it prints, ends the build.
"""

import os
import sys
from pathlib import Path

import smcdiff

sys.path.insert(0, str(Path(__file__).parent))  # docstrings.py lies there
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's progress bars for notebooks; no page shows one

project = "smcdiff"
copyright = "2026, the smcdiff developers"
version = release = smcdiff.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "docstrings"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"smcdiff {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # seconds, of a cell
nb_execution_show_tb = True
nb_output_stderr = "remove-warn"
nb_merge_streams = True

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # quotation marks and dashes in formulas are what they are

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
napoleon_use_rtype = False
