"""Links of pages that stand in the repository, made into links of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from website.nav import FOLDERS, MADE, MOVED, ROOT

LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")


class DeadLink(ValueError):
    """A page links to what is not in the repository; the message names both."""


def on_site(target: str) -> str:
    """Return the name on the site of what stands at `target` in the repository: a page, or a picture.

    What stands in a folder that is a page is shown there. Raises `DeadLink` for what the site does not have.
    """
    path, hash_, anchor = target.partition("#")
    folder = next((folder for folder in FOLDERS if path == folder or path.startswith(folder + "/")), None)
    made = path.removeprefix("docs/") in MADE
    if not made and not (ROOT / path).exists():
        raise DeadLink(f"there is no {path} in the repository")
    if path in MOVED:
        found = MOVED[path]
    elif path.startswith("docs/"):
        found = path.removeprefix("docs/")
    elif folder is not None:
        found = path if path.endswith(".png") else f"{folder}.md"
    else:
        raise DeadLink(f"{path} is no page of the site; say its name without a link")
    return found + hash_ + anchor


def relinked(markdown: str, source: str, page: str) -> str:
    """Return a page's Markdown with its links leading where they lead in the repository.

    `source` is where the page stands in the repository, `page` its name on the site. Raises `DeadLink`.
    """

    def changed(found: re.Match[str]) -> str:
        opening, target, closing = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        try:
            name = on_site(posixpath.normpath(posixpath.join(posixpath.dirname(source), target)))
        except DeadLink as error:
            raise DeadLink(f"{source}: [{target}]: {error}") from None
        return opening + posixpath.relpath(name, posixpath.dirname(page) or ".") + closing

    return LINK.sub(changed, markdown)


def pictures() -> list[Path]:
    """Return the pictures that lie in folders which are pages."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.png"))
