"""The documentation's site: it builds without a warning, has every page and every field, and loads nothing."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))  # the site's room is no part of the package

from decentral.config import Run  # noqa: E402
from decentral.part import Part, Section  # noqa: E402
from decentral.protocols import CODECS, DDP, RULES, Codec, DiLoCo, Int4, Int8, Nesterov, NoLoCo, SyncRule  # noqa: E402
from decentral.protocols.schedule import Every  # noqa: E402
from website.codecs import measured  # noqa: E402
from website.families import FAMILIES  # noqa: E402
from website.fields import described, sections_of, spelled  # noqa: E402
from website.links import DeadLink, relinked  # noqa: E402
from website.nav import FOLDERS, HOME, MADE, MOVED, NAV, source_of  # noqa: E402
from website.traffic import bytes_sent  # noqa: E402

PARTS = [(family.word, name, cls) for family in FAMILIES for name, cls in family.known.items()]


def sections(section: type[Section]) -> Iterator[type[Section]]:
    yield section
    for _, inner, _ in sections_of(section):
        yield from sections(inner)


class Loaded(HTMLParser):
    """Collects what a browser loads by itself for a page, and where the page's links lead."""

    SOURCES: ClassVar = {"script": "src", "img": "src", "iframe": "src", "link": "href"}

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        source = dict(attrs).get(self.SOURCES.get(tag, ""))
        if source is not None and dict(attrs).get("rel") != "canonical":
            self.loaded.append(source)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does, and return its folder; a warning, such as for a dead link, fails."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        build(config)
    finally:
        os.chdir(before)
        logging.getLogger("mkdocs").handlers.clear()
    return folder


def test_every_page_is_in_the_navigation_and_on_the_site(site: Path) -> None:
    in_order = [HOME, *(name for names in NAV.values() for name in names)]
    pages = {*MADE, *MOVED.values(), *(path.name for path in (ROOT / "docs").glob("*.md"))}
    assert sorted(in_order) == sorted(pages)
    assert all((site / name).with_suffix(".html").is_file() for name in (*pages, *(f"{each}.md" for each in FOLDERS)))


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    pages = sorted(page for page in site.rglob("*.html") if page.name != "404.html")  # which servers alone show
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded(page).loaded
        assert loaded
        assert not [source for source in loaded if re.match(r"(?:https?:)?//", source)], page.name
        for source in loaded:
            assert source.startswith("data:") or (page.parent / source.partition("?")[0]).is_file(), (page.name, source)
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", styles)


def test_pages_of_rules_and_codecs_have_all_of_them(site: Path) -> None:
    for page, known in (("rules", RULES), ("codecs", CODECS)):
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        assert all(f'<h2 id="{name}">' in text for name in known)


@pytest.mark.parametrize("section", list(sections(Run)), ids=lambda section: section.__name__)
def test_every_key_of_the_run_file_is_explained(section: type[Section]) -> None:
    assert [row.key for row in described(section)] == [f"`{name}`" for name in section.model_fields]
    assert not [row.key for row in described(section) if not row.meaning or not row.kind]


@pytest.mark.parametrize(("word", "name", "part"), PARTS, ids=[f"{word} {name}" for word, name, _ in PARTS])
def test_every_part_and_field_is_explained_and_found_where_the_page_says(
    word: str, name: str, part: type[Part]
) -> None:
    assert part.__doc__, word
    assert not [row.key for row in described(part) if not row.meaning or not row.kind], name
    public = importlib.import_module(part.__module__.rpartition(".")[0])
    assert getattr(public, part.__name__) is part


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_has_its_equations_and_its_paper(rule: type[Part]) -> None:
    text = "".join(cls.__doc__ or "" for cls in rule.__mro__ if issubclass(cls, Part))
    assert re.search(r"^ {8}\S.*(?:<-|=)", text, re.MULTILINE), "no equation"
    assert re.search(r"arXiv|et al\.", text), "no paper"


def test_values_are_spelled_as_a_run_file_takes_them() -> None:
    rule = DiLoCo(period=Every(period=20), outer=Nesterov(lr=1.0), codec=Int8(block=64))
    text = '{name = "diloco", codec = {name = "int8", block = 64}, period = 20, outer = {name = "nesterov", lr = 1}}'
    assert spelled(rule) == text
    assert [spelled(value) for value in (True, 100e6, 0.05, "a", (1, 2), DiLoCo())] == [
        "true",
        "1e8",
        "0.05",
        '"a"',
        "[1, 2]",
        '"diloco"',
    ]


@pytest.mark.parametrize(
    ("rule", "nbytes"),
    [(DDP(), 2 * 3 / 4 * 4), (DiLoCo(), 2 * 3 / 4 * 4 / 500), (NoLoCo(), 4 / 50)],
    ids=["ddp", "diloco", "noloco"],
)
def test_what_is_counted_of_a_rule_is_what_theory_says(rule: SyncRule, nbytes: float) -> None:
    """2 (n - 1) / n of a float32 vector for an all-reduce, the vector itself for a pair; headers are small."""
    assert bytes_sent(rule) == pytest.approx(nbytes, rel=1e-3)
    assert bytes_sent(rule) > nbytes


@pytest.mark.parametrize(("codec", "levels"), [(Int8(), 127), (Int4(), 7)], ids=["int8", "int4"])
def test_what_is_measured_of_a_codec_is_what_theory_says(codec: Codec, levels: int) -> None:
    """A uniform rounding error of width max|x| / levels in each block: its rms is that over sqrt(12)."""
    values = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0)).view(-1)
    block = codec.grain
    peaks = values[: len(values) // block * block].view(-1, block).abs().amax(dim=1)
    found = measured(codec)
    assert found.nbytes == codec.wire_bytes(1_000_000)
    assert found.error == pytest.approx(float(peaks.square().mean().sqrt()) / levels / 12**0.5, rel=0.02)


def test_links_lead_where_they_lead_in_the_repository() -> None:
    for there, here in {
        "[a](../examples/own_loop/train.py)": "[a](examples/own_loop.md)",
        "![a](../examples/launch/timeline.png)": "![a](examples/launch/timeline.png)",
        "[a](wire.md#lies)": "[a](wire.md#lies)",
        "[a](#here)": "[a](#here)",
        "[a](https://arxiv.org)": "[a](https://arxiv.org)",
    }.items():
        assert relinked(there, "docs/report.md", "report.md") == here
    assert relinked("[a](docs/wire.md)", "README.md", HOME) == "[a](wire.md)"
    assert relinked("[a](../stage_loss)", "examples/spot_weekend/README.md", "examples/spot_weekend.md") == (
        "[a](stage_loss.md)"
    )
    with pytest.raises(DeadLink, match=r"docs/report.md: \[none.md\]: there is no docs/none.md"):
        relinked("[a](none.md)", "docs/report.md", "report.md")
    assert source_of(HOME) == ROOT / "README.md"
