"""Sphinx: the pages beside this file, and the API from the docstrings."""

import fxdbsr

project = "fxdbsr"
author = "the fxdbsr authors"
version = release = fxdbsr.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fxdbsr {version}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings mark code with one backtick
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
nitpicky = False


def setup(app):
    """Bars in docstrings are bars: nothing here uses reStructuredText's substitutions."""

    def escape_bars(app, what, name, object, options, lines):
        lines[:] = [line if line.lstrip().startswith(">>>") else line.replace("|", r"\|") for line in lines]

    app.connect("autodoc-process-docstring", escape_bars)
