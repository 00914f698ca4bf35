"""Fragments partition the parameters, whatever the model looks like."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from cluster import short
from torch import nn

from decentral.errors import ConfigError
from decentral.protocols import Buckets, Cut, Layers, Whole
from decentral.protocols.fragments import Fragment, require_partition
from decentral.state import Layout, layout_of
from decentral.tasks import ByteGPT


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight


class Nested(nn.Module):
    """Like a model inside a wrapper whose name ends in a number, with lists in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt2 = nn.ModuleDict(
            {
                "wte": nn.Embedding(5, 3),
                "h": nn.ModuleList(
                    nn.ModuleDict(
                        {"experts": nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), "norm": nn.LayerNorm(3)}
                    )
                    for _ in range(4)
                ),
                "ln_f": nn.LayerNorm(3),
            }
        )
        self.heads = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))


class Scalars(nn.Module):
    """No layers at all; a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))
        self.weight = nn.Parameter(torch.ones(3, 2))


class ResNet(nn.Module):
    """The names of torchvision's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 2, 3)
        self.bn1 = nn.BatchNorm2d(2)
        for number in range(1, 5):
            blocks = [nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)) for _ in range(2)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(2, 2)


MODELS = {
    "tied": Tied,
    "nested": Nested,
    "scalars": Scalars,
    "resnet": ResNet,
    "sequential": lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),
    "one": lambda: nn.Linear(3, 2, bias=False),
    "gpt": lambda: ByteGPT(depth=3, width=16, heads=2).model(),
}
CUTS: Sequence[Cut] = [
    Whole(),
    *(Layers(layers=count, order=order) for count in (1, 2, 3, 100) for order in ("strided", "sequential")),  # type: ignore[arg-type]
    *(Buckets(megabytes=megabytes) for megabytes in (1e-7, 4e-5, 25.0)),
]


@pytest.fixture(params=MODELS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return layout_of(MODELS[request.param]())


@pytest.mark.parametrize("cut", CUTS, ids=short)
def test_every_cut_partitions_every_model(cut: Cut, layout: Layout) -> None:
    fragments = cut.split(layout)
    require_partition(fragments, layout)
    covered = torch.zeros(layout.size)
    for fragment in fragments:
        assert list(fragment.spans) == sorted(fragment.spans)
        fragment.write(covered, fragment.read(covered) + 1)
    assert torch.equal(covered, torch.ones(layout.size))


@pytest.mark.parametrize("cut", CUTS, ids=short)
def test_what_is_read_can_be_written_back(cut: Cut, layout: Layout) -> None:
    flat = torch.arange(layout.size, dtype=torch.float32)
    rebuilt = torch.empty_like(flat)
    for fragment in cut.split(layout):
        values = fragment.read(flat)
        assert values.shape == (fragment.size,)
        fragment.write(rebuilt, values)
    assert torch.equal(rebuilt, flat)


@pytest.mark.parametrize("buckets", CUTS, ids=short)
def test_pieces_of_fragments_partition_them_along_the_buckets(buckets: Cut, layout: Layout) -> None:
    fragments, others = Layers(layers=2).split(layout), buckets.split(layout)
    for fragment in fragments:
        pieces = fragment.cut(others)
        assert sum(piece.size for piece in pieces) == fragment.size
        marks = torch.zeros(layout.size)
        fragment.write(marks, torch.ones(fragment.size))
        assert all(bool((piece.read(marks) == 1).all()) for piece in pieces)  # all of a piece is the fragment's
        assert [piece.cut(others) for piece in pieces] == [[piece] for piece in pieces]  # and one bucket's
    require_partition([piece for fragment in fragments for piece in fragment.cut(others)], layout)


def names(layout: Layout, fragment: Fragment) -> list[str]:
    return [e.name for e in layout.entries if any(start <= e.start < stop for start, stop in fragment.spans)]


def layers_of(order: str, layers: int, model: nn.Module) -> list[set[str]]:
    layout = layout_of(model)
    fragments = Layers(layers=layers, order=order).split(layout)  # type: ignore[arg-type]
    return [{name.rsplit(".", 1)[0] for name in names(layout, fragment)} for fragment in fragments]


def test_strided_fragments_take_every_nth_layer() -> None:
    assert layers_of("strided", 3, Tied()) == [
        {"blocks.0", "blocks.3", "blocks.6"},
        {"blocks.1", "blocks.4"},
        {"blocks.2", "blocks.5"},
        {"embedding"},
    ]


def test_sequential_fragments_take_neighbours() -> None:
    assert layers_of("sequential", 3, Tied()) == [
        {"blocks.0", "blocks.1", "blocks.2"},
        {"blocks.3", "blocks.4", "blocks.5"},
        {"blocks.6"},
        {"embedding"},
    ]


def test_the_stack_is_the_largest_list_whatever_else_is_numbered() -> None:
    layout = layout_of(Nested())
    fragments = Layers(layers=1).split(layout)
    assert len(fragments) == 5
    for index, fragment in enumerate(fragments[:4]):
        assert all(name.startswith(f"gpt2.h.{index}.") for name in names(layout, fragment))
    outside = {name.split(".")[1] for name in names(layout, fragments[4]) if name.startswith("gpt2")}
    assert outside == {"wte", "ln_f"}
    assert "heads.1.weight" in names(layout, fragments[4])


def test_torchvision_names_are_layers() -> None:
    layout = layout_of(ResNet())
    fragments = Layers(layers=1).split(layout)
    tops = [{name.split(".")[0] for name in names(layout, fragment)} for fragment in fragments]
    assert tops == [{"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}, {"conv1", "bn1", "fc"}]


def test_the_gpts_blocks_are_layers() -> None:
    layout = layout_of(ByteGPT(depth=3, width=16, heads=2).model())
    assert len(layout.layers()) == 3
    sizes = {stop - start for start, stop in layout.layers()}
    assert len(sizes) == 1


def test_a_model_without_layers_is_one_fragment() -> None:
    assert len(Layers(layers=1).split(layout_of(Scalars()))) == 1


def test_blocks_are_the_layers_and_what_lies_between() -> None:
    layout = layout_of(Tied())
    blocks = layout.blocks()
    assert blocks[0] == (0, 44)
    assert blocks[1:] == layout.layers() == [(44 + 20 * index, 64 + 20 * index) for index in range(7)]
    assert [start for start, _ in blocks[1:]] == [stop for _, stop in blocks[:-1]]


@pytest.mark.parametrize("megabytes", [1e-7, 8e-5, 2e-4])
def test_buckets_hold_as_much_as_they_may(megabytes: float, layout: Layout) -> None:
    limit = int(megabytes * 2**20 / 4)
    buckets = Buckets(megabytes=megabytes).split(layout)
    starts = {entry.start: entry for entry in layout.entries}
    for bucket, following in zip(buckets, [*buckets[1:], None], strict=True):
        ((start, stop),) = bucket.spans
        assert stop - start <= limit or starts[start].stop == stop
        if following is not None:
            assert starts[stop].stop - start > limit  # the next parameter would not have fitted


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([((0, 9),)], "cover 9 of 10"),
        ([((0, 5),), ((4, 10),)], "element 5"),
        ([((0, 5),), ((6, 10),)], "element 5"),
        ([((0, 10),), ((0, 10),)], "element 10"),
        ([], "cover 0 of 10"),
    ],
)
def test_what_is_no_partition_is_refused(spans: list[tuple[tuple[int, int], ...]], message: str) -> None:
    layout = layout_of(nn.Linear(4, 2))
    with pytest.raises(ConfigError, match=message):
        require_partition([Fragment(span) for span in spans], layout)
