"""What a run file says of links: what is looked up where, and what is refused."""

from __future__ import annotations

import csv
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from decentral.config import Run, read_run, validated, write_run
from decentral.errors import ConfigError
from decentral.fleet import Fleet
from decentral.fleet.links import Route
from decentral.fleet.sites import known_link, known_sites, line_of

LAB = {"workers": [{"count": 2, "site": "lab"}, {"site": "hut"}]}


def routes_of(fleet: dict[str, Any], **network: Any) -> dict[tuple[str | None, str | None], Route]:
    checked = Fleet(**fleet, network=network)
    checked.check()
    return checked.network.routes(checked.sites(), checked.latency_s)


def table_of(fleet: dict[str, Any], **network: Any) -> dict[str, Any]:
    return {"fleet": {**fleet, "network": network}}


# Looking up.


def test_a_fleet_without_sites_has_its_latency_and_no_caps() -> None:
    assert routes_of({"latency_s": 0.03}) == {(None, None): Route(latency_s=0.03)}


def test_a_link_holds_both_ways_unless_the_other_way_has_its_own() -> None:
    there = {"source": "lab", "to": "hut", "bps": 1e6, "latency_s": 0.01, "loss": 0.01}
    back = {"source": "hut", "to": "lab", "bps": 2e6, "latency_s": 0.02}
    routes = routes_of(LAB, links=[there])
    assert routes["lab", "hut"] == routes["hut", "lab"] == Route(bps=1e6, latency_s=0.01, loss=0.01)
    assert routes["lab", "lab"] == Route(latency_s=0.0005)
    assert routes_of(LAB, links=[there, back])["hut", "lab"] == Route(bps=2e6, latency_s=0.02)


def test_each_figure_comes_from_the_first_that_says_it(tmp_path: Path) -> None:
    bps, latency_s = tmp_path / "bps.csv", tmp_path / "latency.csv"
    bps.write_text("to,lab,hut,barn\nlab,,3e6,4e6\nhut,5e6,,\n")
    latency_s.write_text("to,hut\nlab,0.07\n")
    routes = routes_of(
        {"workers": [{"site": "lab"}, {"site": "hut"}, {"site": "barn"}], "latency_s": 0.4},
        matrices={"bps": str(bps), "latency_s": str(latency_s)},
        links=[{"source": "lab", "to": "hut", "bps": 1e6}, {"loss": 0.1}],
    )
    assert routes["lab", "hut"] == Route(bps=1e6, latency_s=0.07, loss=0.1)  # link, matrix, any
    assert routes["hut", "lab"] == Route(bps=1e6, latency_s=0.4, loss=0.1)  # the link the other way, the fleet's
    assert routes["lab", "barn"] == Route(bps=4e6, latency_s=0.4, loss=0.1)
    assert routes["hut", "barn"] == Route(latency_s=0.4, loss=0.1)
    assert routes["hut", "hut"] == Route(latency_s=0.0005)  # its workers are not apart


def test_a_link_changes_single_figures_of_known_ones() -> None:
    fleet = {"workers": [{"site": "halos:0"}, {"site": "halos:3"}]}
    routes = routes_of(fleet, links=[{"source": "halos:0", "to": "halos:3", "latency_s": 0.09}])
    assert routes["halos:3", "halos:0"] == Route(bps=0.202e9, latency_s=0.09)
    assert routes["halos:0", "halos:0"] == Route(bps=100e9, latency_s=0.0005)


def test_every_pair_of_cloud_regions_is_the_measured_one() -> None:
    def cells(name: str) -> dict[tuple[str, str], float]:
        text = (resources.files("decentral.fleet") / "data" / name).read_text()
        rows = list(csv.DictReader(text.splitlines()))
        return {
            (row["src\\dst"], to): float(cell) for row in rows for to, cell in row.items() if to != "src\\dst" and cell
        }

    gbps, rtt_ms = cells("skyplane_gbps_2022-01.csv"), cells("skyplane_rtt_ms_2022-04.csv")
    assert len(gbps) == len(rtt_ms) == 60 * 59
    for source, to in gbps:
        known = known_link(source, to)
        assert known is not None
        assert known.bps == pytest.approx(gbps[source, to] * 1e9, rel=1e-12)
        assert known.latency_s == pytest.approx(rtt_ms[source, to] / 2000, rel=1e-12)
    assert known_link("aws:us-east-1", "aws:us-east-1") is None
    assert {site.partition(":")[0] for site in known_sites()} == {
        *("aws", "azure", "gcp", "halos", "low", "medium", "high", "home", "wan", "mobile", "poor")
    }
    assert all(line_of(site) is not None for site in known_sites())


@pytest.mark.parametrize(("kind", "bps", "latency_s"), [("low", 10e9, 1e-2), ("medium", 100e9, 1e-3)])
def test_data_centres_of_a_kind_are_joined_by_it_and_high_inside(kind: str, bps: float, latency_s: float) -> None:
    routes = routes_of({"workers": [{"site": f"{kind}:east"}, {"site": f"{kind}:west"}]})
    assert routes[f"{kind}:east", f"{kind}:west"] == Route(bps=bps, latency_s=latency_s)
    assert routes[f"{kind}:east", f"{kind}:east"] == Route(bps=400e9, latency_s=1e-4)


def test_homes_are_apart_from_each_other() -> None:
    fleet = {"workers": [{"count": 2, "site": "home"}, {"site": "mobile"}]}
    routes = routes_of(fleet, links=[{"loss": 0.01}])
    assert routes["home", "home"] == routes["home", "mobile"] == Route(loss=0.01)  # latencies are the lines'


# Refusing.

WRONG = [
    (LAB, {}, "no link between 'lab' and 'hut'; give a [[fleet.network.links]]"),
    ({"workers": [{"site": "lab"}, {}]}, {}, "no link between 'lab' and the groups without a site"),
    ({"workers": [{"site": "low:a"}, {"site": "high:a"}]}, {}, "no link between 'low:a' and 'high:a'"),
    ({"workers": [{"site": "hoem"}, {"site": "wan"}]}, {}, "no link between 'hoem' and 'wan'; did you mean 'home'?"),
    ({"workers": [{"site": "aws:us-east-11"}]}, {}, "unknown site 'aws:us-east-11'; did you mean 'aws:us-east-1'?"),
    (
        LAB,
        {"links": [{"source": "lab", "to": "hat"}]},
        "links.0.to: no group is at 'hat'; did you mean 'hut'? sites: hut",
    ),
    (LAB, {"links": [{"source": "lab"}]}, "links.0: source and to: give both"),
    (LAB, {"links": [{}, {}]}, "links.1: there is a link from any to any already"),
    (LAB, {"links": [{"bps": 100}]}, "links.0.bps: Input should be greater than or equal to 1000 (got 100)"),
    (LAB, {"links": [{"latency_s": -0.1}]}, "links.0.latency_s: Input should be greater than or equal to 0"),
    (LAB, {"links": [{"latency_s": 80}]}, "links.0.latency_s: Input should be less than or equal to 60"),
    (LAB, {"links": [{"loss": 1.0}]}, "links.0.loss: Input should be less than or equal to 0.2"),
    (LAB, {"links": [{"bsp": 1e6}]}, "unknown field 'bsp'; did you mean 'bps'?"),
    (LAB, {"links": [{"daily_dip": 0.5}]}, "give both"),
    (LAB, {"links": [{"daily_dip": 0.5, "busiest_at_s": 0}]}, "daily_dip is a share of bps"),
    (LAB, {"links": [{"latency_s": 0, "jitter_s": 0.1}]}, "jitter_s needs a mean latency above 0"),
    (LAB, {"sharing": "fare"}, "sharing: Input should be 'fair' or 'rtt_weighted'"),
    (LAB, {"window_bytes": 64}, "window_bytes: Input should be greater than or equal to 1024"),
]
PARTITIONS = [
    ({"from_s": 5, "until_s": 5, "side": [0]}, "until_s = 5 must be after from_s = 5"),
    ({"from_s": 0, "until_s": 5, "side": [3]}, "partitions.0.side: 3, but workers are numbered 0 to 2"),
    ({"from_s": 0, "until_s": 5, "side": ["lap"]}, "side: no group is at 'lap'; did you mean 'lab'? sites: hut, lab"),
    ({"from_s": 0, "until_s": 5, "side": ["lab"], "other_side": [1]}, "other_side: worker 1 is on both sides"),
    ({"from_s": 0, "until_s": 5, "side": ["lab", "hut"]}, "all workers are on it"),
    ({"from_s": 0, "until_s": 5, "side": []}, "side: Tuple should have at least 1 item"),
]


@pytest.mark.parametrize(
    ("fleet", "network", "message"),
    [*WRONG, *((LAB, {"links": [{}], "partitions": [each]}, message) for each, message in PARTITIONS)],
)
def test_what_cannot_be_is_refused_when_the_run_file_is_read(
    fleet: dict[str, Any], network: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(table_of(fleet, **network), "run.toml")
    assert str(caught.value).startswith("run.toml: fleet.")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read it: No such file"),
        ("", "the first line must name the destinations"),
        ("to,lab,hut\nlab,,fast\n", "row 'lab', column 'hut': expected a number above 0, not 'fast'"),
        ("to,lab,hut\nlab,,-3\n", "expected a number above 0, not '-3'"),
        ("to,lab,hut\nlab,,inf\n", "expected a number above 0, not 'inf'"),
        ("to,lab,hut\nlab,3\n", "row 'lab' has 1 cells for 2 columns"),
        ("to,lab,hut\nlab,,3\nlab,,4\n", "'lab' to 'hut' is there twice"),
    ],
)
def test_a_matrix_that_cannot_be_read_says_where(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "bps.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        validated(table_of(LAB, matrices={"bps": str(path)}), "run.toml")
    assert str(caught.value).startswith(f"run.toml: fleet.network.matrices.bps: {path}: ")
    assert message in str(caught.value)


# Run files.


def test_a_run_file_spells_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        """
        [[fleet.workers]]
        count = 3
        site = "aws:us-east-1"
        [[fleet.workers]]
        site = "lab"
        [fleet.network]
        sharing = "rtt_weighted"
        window_bytes = 4_194_304
        [[fleet.network.links]]
        source = "lab"
        to = "aws:us-east-1"
        bps = 1e9
        latency_s = 0.03
        jitter_s = 0.005
        loss = 1e-4
        daily_dip = 0.3
        busiest_at_s = 72_000
        [[fleet.network.partitions]]
        from_s = 600
        until_s = 900
        side = ["lab"]
        other_side = [0, 1]
        """
    )
    run: Run = read_run(path)
    route = run.fleet.network.routes(run.fleet.sites(), run.fleet.latency_s)["aws:us-east-1", "lab"]
    assert route == Route(1e9, 0.03, 0.005, 1e-4, 0.3, 72_000)
    assert route.bps < math.inf
    again = tmp_path / "again.toml"
    write_run(run, again)
    assert read_run(again) == run
