"""How Sphinx builds these pages: `make docs`. Every warning is an error there, so a broken link is one."""

import sepc

project = "sepc"
author = "the authors of sepc"
version = release = sepc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]

html_theme = "furo"
html_title = "sepc"
# No page asks for anything that is not beside it.
html_show_sourcelink = False

# GitHub shows the same pages, and names headings so.
myst_heading_anchors = 3
# Blocks in a language that is not named are commands and pictures of text.
highlight_language = "text"

# In docstrings, names stand in single backticks.
default_role = "code"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
