"""The documentation as a site: pages made of the code itself, and what leads from `docs/` to a static site.

    make docs      # then open site/index.html

mkdocs reads `docs/` and calls `website/hooks.py`, which adds what is written nowhere because the code says it: the run
file's reference, all rules with their equations, all codecs with their error and bytes, and all limits.
"""
