"""Pictures of runs: what is drawn, and under which name."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster import NET, cluster
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from decentral.config import Run
from decentral.journal import Counterfactual
from decentral.outcome import Outcome
from decentral.protocols import PBT, SingleMerge
from decentral.report.curves import curve_of
from decentral.report.plots import Drawn, plot_runs, runs_figure, timeline_figure
from decentral.sim.simulate import simulate


@pytest.fixture(scope="module")
def looked() -> tuple[Run, Outcome]:
    """A run that looks at the mean of its workers after 8 and 16 of 24 steps."""
    run = cluster(SingleMerge(period=4, rate=0.5, evaluate_merged=2), 3, 24, task=NET)
    run = run.model_copy(update={"evaluate_every": 4})
    return run, simulate(run)


def drawn(*outcomes: Outcome) -> list[Drawn]:
    return [Drawn(curve_of(outcome, "loss"), 1000.0) for outcome in outcomes]


def lines(axes: Axes) -> dict[str, Line2D]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def named(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_looks_at_the_mean_of_the_workers_are_a_line_of_their_own(looked: tuple[Run, Outcome]) -> None:
    _run, outcome = looked
    looks = [record for record in outcome.records if isinstance(record, Counterfactual)]
    assert [record.step for record in looks] == [8, 16]
    losses = [record.metrics["loss"] for record in looks]
    figure = runs_figure({"merged once": drawn(outcome)}, "loss")
    by_samples, by_seconds, _bytes = figure.axes
    assert named(by_samples) == ["merged once", "merged once: mean of workers"]
    own, mean = lines(by_samples)["merged once"], lines(by_samples)["merged once: mean of workers"]
    assert list(mean.get_xdata()) == [8 * 3, 16 * 3]
    assert list(mean.get_ydata()) == losses
    assert mean.get_color() == own.get_color()
    assert (mean.get_marker(), mean.get_linestyle()) != (own.get_marker(), own.get_linestyle())
    assert losses in [list(line.get_ydata()) for line in by_seconds.get_lines()]


def test_seeds_of_one_name_share_its_colour_and_its_place_in_the_legend(looked: tuple[Run, Outcome]) -> None:
    run, outcome = looked
    other = simulate(run.model_copy(update={"seed": 1}))
    figure = runs_figure({"merged once": drawn(outcome, other), "again": drawn(other)}, "loss")
    by_samples, _seconds, by_bytes = figure.axes
    assert named(by_samples) == [
        f"{name}{means}" for name in ("merged once", "again") for means in ("", ": mean of workers")
    ]
    stars = [line for line in by_samples.get_lines() if line.get_marker() == "*"]
    assert [line.get_color() for line in stars] == ["C0", "C0", "C1"]
    assert [line.get_ydata()[0] for line in stars] == [each.after["loss"] for each in (outcome, other, other)]
    assert len(by_bytes.patches) == 2


def test_so_are_they_in_a_timeline(looked: tuple[Run, Outcome]) -> None:
    run, outcome = looked
    figure = timeline_figure(outcome.records, run, run.make_task())
    metric = figure.axes[0]
    assert named(metric) == ["first worker", "mean of workers"]
    looks = [record for record in outcome.records if isinstance(record, Counterfactual)]
    assert list(lines(metric)["mean of workers"].get_xdata()) == [record.time_s for record in looks]
    assert list(lines(metric)["mean of workers"].get_ydata()) == [record.metrics["loss"] for record in looks]


def test_groups_that_train_apart_are_a_line_each() -> None:
    run = cluster(PBT(period=2, ready=4, groups=2, lr=(0.01, 0.1)), 3, 12, task=NET)
    outcome = simulate(run.model_copy(update={"evaluate_every": 4}))
    figure = timeline_figure(outcome.records, run, run.make_task())
    metric = figure.axes[0]
    assert named(metric) == ["first worker", "group of worker 0", "group of worker 1"]
    for first in (0, 1):
        looks = [record for record in outcome.records if isinstance(record, Counterfactual) and record.worker == first]
        assert [record.step for record in looks] == [4, 8, 12]
        drawn = lines(metric)[f"group of worker {first}"].get_ydata()
        assert list(drawn) == [record.metrics["loss"] for record in looks]


def test_a_run_without_looks_has_no_such_line(looked: tuple[Run, Outcome], tmp_path: Path) -> None:
    run = looked[0].model_copy(update={"rule": SingleMerge(period=4, rate=0.5)})
    outcome = simulate(run)
    open_before = plt.get_fignums()
    figure, over_time = (
        runs_figure({"once": drawn(outcome)}, "loss"),
        timeline_figure(outcome.records, run, run.make_task()),
    )
    assert named(figure.axes[0]) == ["once"]
    assert named(over_time.axes[0]) == []
    plot_runs({"once": drawn(outcome)}, "loss", tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == open_before
