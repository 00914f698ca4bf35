"""What mkdocs calls while it builds the site, named by `mkdocs.yml`: pages that are made, navigation, links."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from website.codecs import codecs_page
from website.commands import commands_page
from website.folders import folder_page
from website.limits import limits_page
from website.links import DeadLink, pictures, relinked
from website.nav import FOLDERS, MADE, MOVED, ROOT, nav, source_of, written
from website.parts import parts_page, rules_page
from website.run_file import run_file_page

MAKERS: Mapping[str, Callable[[], str]] = {
    "run_file.md": run_file_page,
    "rules.md": rules_page,
    "codecs.md": codecs_page,
    "parts.md": parts_page,
    "commands.md": commands_page,
    "limits.md": limits_page,
}
"""What makes each page of `MADE`."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Give mkdocs the navigation."""
    config.nav = nav()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and those that stand outside `docs/`."""
    content = {name: MAKERS[name]() for name in MADE}
    content |= {name: (ROOT / source).read_text(encoding="utf-8") for source, name in MOVED.items()}
    try:
        content |= {f"{folder}.md": folder_page(folder) for folder in FOLDERS}
    except DeadLink as error:
        raise PluginError(str(error)) from error
    for name, text in content.items():
        files.append(File.generated(config, name, content=text))
    for picture in pictures():
        name = picture.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have the links of a page that is written by hand lead to pages of the site."""
    name = page.file.src_uri
    if name not in written():
        return markdown
    try:
        return relinked(markdown, source_of(name).relative_to(ROOT).as_posix(), name)
    except DeadLink as error:
        raise PluginError(str(error)) from error
