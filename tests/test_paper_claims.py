"""The runner of papers' claims, on tiny ones, and the run files of all claims."""

from __future__ import annotations

import io
import json
import math
import statistics
import sys
from pathlib import Path

import pytest
from rich.console import Console

from decentral.config import Run
from decentral.errors import ConfigError
from decentral.inner import SGD
from decentral.outcome import Outcome
from decentral.protocols import DiLoCo, HierarchicalDiLoCo
from decentral.replica import held_out, initial_model
from decentral.sim.simulate import simulate
from decentral.state import layout_of
from decentral.task import Task
from decentral.tasks import Quadratic

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the examples are no part of the package

from examples.papers import __main__ as command  # noqa: E402
from examples.papers import outer, picture, runner  # noqa: E402
from examples.papers.runner import Claim, Findings, judge, run_of, verdict_table  # noqa: E402


def tiny(seed: int) -> Findings:
    """DiLoCo of two workers on a quadratic from a start that the seed moves; the second check holds under seed 0."""
    task = {"name": "quadratic", "dimension": 16, "start": 3.0 + seed, "noise": 0.1}
    run = run_of(DiLoCo(period=2), seed, 4, runner.equal(2), task, SGD(lr=0.1))
    outcome = runner.outcome_of(run)
    figures = {"loss": outcome.after["loss"], "one worker": runner.alone(run), "workers": float(len(outcome.params))}
    return Findings(figures, {"two workers": len(outcome.params) == 2, "first seed": seed == 0})


CLAIM = Claim("tiny", "Nobody, arXiv 0000.00000", "a quadratic is learnt", tiny)


def printed(verdicts: list[runner.Verdict]) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as capture:
        console.print(verdict_table(verdicts))
    return capture.get()


def test_a_claim_is_judged_by_all_its_seeds_and_the_table_tells_the_spread() -> None:
    verdict = judge(CLAIM, range(3))
    losses = [tiny(seed).figures["loss"] for seed in range(3)]
    assert len(set(losses)) == 3
    assert verdict.spread("loss") == (statistics.median(losses), min(losses), max(losses))
    assert verdict.held() == {"two workers": 3, "first seed": 1}
    assert not verdict.holds
    assert judge(CLAIM, [0]).holds
    text = printed([verdict])
    low, middle, high = sorted(losses)
    assert f"loss: {middle:.4g} ({low:.4g} to {high:.4g})" in text
    assert "workers: 2 (" not in text  # nothing to tell where all seeds agree
    assert "two workers: 3 of 3" in text
    assert "first seed: 1 of 3" in text
    assert "does not hold" in text
    assert "does not hold" not in printed([judge(CLAIM, [0])])


def test_the_command_prints_a_table_or_json_and_names_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "CLAIMS", (CLAIM,))
    monkeypatch.setattr("sys.argv", ["papers", "tiny", "--seeds", "2", "--json"])
    command.main()
    table = json.loads(capsys.readouterr().out)
    assert table["figures"]["loss"] == [tiny(seed).figures["loss"] for seed in range(2)]
    assert (table["claim"], table["seeds"], table["holds"]) == ("tiny", [0, 1], False)
    monkeypatch.setattr("sys.argv", ["papers", "--seeds", "1"])
    command.main()
    assert "median (minimum to maximum)" in capsys.readouterr().out
    for arguments, message in (
        (["small"], "no claim is called small; there are tiny"),
        (["--seeds", "0"], "at least 1"),
    ):
        monkeypatch.setattr("sys.argv", ["papers", *arguments])
        with pytest.raises(SystemExit):
            command.main()
        assert message in capsys.readouterr().err


def test_a_run_that_cannot_work_is_refused_before_anything_is_run() -> None:
    with pytest.raises(ConfigError):
        run_of(HierarchicalDiLoCo(regions=(2, 2)), 0, 4, runner.equal(3))


class Tiny(Quadratic):
    """A quadratic that also tells an accuracy, for runs whose own model is too large for a test."""

    def evaluate(self, model: object) -> dict[str, float]:
        metrics = super().evaluate(model)  # type: ignore[arg-type]
        return {**metrics, "accuracy": 1 / (1 + metrics["loss"])}


STEPS = 20


@pytest.mark.parametrize("claim", command.CLAIMS, ids=lambda claim: claim.name)
def test_every_claims_run_files_are_valid_and_have_the_one_worker(
    claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is checked as it is, and run on a quadratic for at most 20 steps, so that the claim is worked out."""
    runs: list[Run] = []

    def small(run: Run, *, timing_only: bool = False) -> Outcome:
        run.check()
        run.rule.check_layout(layout_of(initial_model(run.make_task(), run.seed)))
        runs.append(run)
        task = {"name": "test_paper_claims:Tiny", "dimension": 64, "noise": 0.1}
        return simulate(run.model_copy(update={"task": task, "steps": min(run.steps, STEPS)}), timing_only=timing_only)

    def metrics(_task: Task, seed: int, params: object) -> dict[str, float]:
        return held_out(Tiny(dimension=64, noise=0.1), seed, params)  # type: ignore[arg-type]

    monkeypatch.setattr(runner, "simulate", small)
    monkeypatch.setattr(outer, "simulate", small)
    monkeypatch.setattr(runner, "held_out", metrics)
    findings = claim.measure(0)
    assert findings.checks
    assert not any(math.isnan(figure) for figure in findings.figures.values())
    assert any("one worker" in name for name in findings.figures)
    assert claim.measure.__doc__ is not None
    assert "Holds if" in claim.measure.__doc__
    alone = [run for run in runs if run.fleet.size == 1]
    assert {run.steps for run in alone} == {run.steps for run in runs}  # as many local steps as each of the others
    assert {run.seed for run in runs} == {0}


def test_the_picture_has_a_line_for_each_rule_and_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = {"name": "quadratic", "dimension": 16, "noise": 0.1}

    def runs_of(seed: int) -> dict[str, Run]:
        rules = {"often": DiLoCo(period=1), "seldom": DiLoCo(period=2)}
        inner = SGD(lr=0.1)
        return {
            name: run_of(rule, seed, 4, runner.equal(2), task, inner, evaluate_every=2) for name, rule in rules.items()
        }

    monkeypatch.setattr(picture, "CLAIMS", {"one": runs_of, "another": runs_of})
    assert [len(axes.lines) for axes in picture.figure_of(seeds=2).axes] == [4, 4]
    monkeypatch.setattr(sys, "argv", ["picture", str(tmp_path / "claims.png"), "--seeds", "1"])
    picture.main()
    assert (tmp_path / "claims.png").read_bytes().startswith(b"\x89PNG")
