"""A page says what the journal says: its figures are held to sums made here, record by record."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from cluster import cluster
from folders import Page, eventful, simulated, written
from torch import Tensor

from decentral import cli
from decentral.config import Run
from decentral.errors import ConfigError
from decentral.journal import Evaluated, Joined, Left, Record, Refused, Sketched, Synced, Trained, read_journal
from decentral.protocols import DiLoCo
from decentral.report.page import read_runs, write_pictures
from decentral.report.page.course import Course
from decentral.report.page.lanes import lanes_of
from decentral.report.page.learning import spread
from decentral.report.page.words import duration_text
from decentral.report.summary import dollars_text, size_text
from decentral.sim.watch import Watch
from decentral.sketch import sketch_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulated(eventful(), tmp_path_factory.mktemp("runs") / "first", Watch(spans=True))


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return list(read_journal(folder / "journal.jsonl"))


def lines_of(*records: Record) -> list[str]:
    return [record.to_json() + "\n" for record in records]


def begin(worker: int = 0, time_s: float = 0.0) -> Joined:
    return Joined(time_s=time_s, worker=worker, parameters=16)


def phase(time_s: float, loss: float | None = 1.0, worker: int = 0) -> Trained:
    return Trained(time_s=time_s, worker=worker, step=3, steps=3, samples=3, seconds=0.1, loss=loss)


def test_the_key_figures_are_those_of_the_journal(folder: Path, records: list[Record]) -> None:
    shown = Page(folder)
    (evaluation, *_, last) = [record for record in records if isinstance(record, Evaluated)]
    assert evaluation.step == 0
    assert f"held-out loss {evaluation.metrics['loss']:.4g} → " in shown.text
    assert last.step == 24
    assert shown.facts["samples"] == str(sum(record.samples for record in records if isinstance(record, Trained)))
    assert shown.facts["virtual time"] == duration_text(max(record.time_s for record in records))
    assert shown.facts["sent by all"] == size_text(sum(each.sent_bytes for each in records if isinstance(each, Left)))
    rounds = Counter(record.outcome for record in records if isinstance(record, Synced))
    assert shown.facts["worker-rounds"] == str(rounds.total())
    assert shown.facts["workers lost"] == "1"
    for outcome, count in rounds.items():
        assert f"{outcome} {count} ({count / rounds.total():.1%})" in shown.text
        assert shown.rows("Channels")[0][outcome] == str(count)


def test_the_table_of_workers_adds_up_all_stays(folder: Path, records: list[Record]) -> None:
    rows = Page(folder).rows("Workers")
    assert [row["worker"] for row in rows] == ["0", "1", "2"]
    for number, row in enumerate(rows):
        mine = [record for record in records if record.worker == number]
        left = [record for record in mine if isinstance(record, Left)]
        assert row["samples"] == str(sum(record.samples for record in mine if isinstance(record, Trained)))
        assert row["sent"] == size_text(sum(record.sent_bytes for record in left))
        assert row["received"] == size_text(sum(record.received_bytes for record in left))
        assert row["talking"] == duration_text(sum(record.seconds["talk"] for record in left))
        assert row["stays"] == str(len(left))
        assert row["end"] == left[-1].reason
    joined = [record.time_s for record in records if isinstance(record, Joined) and record.worker == 1]
    crashed = next(record.time_s for record in records if isinstance(record, Left))
    assert rows[1]["down"] == duration_text(joined[1] - crashed)


def test_dollars_are_the_rent_of_every_stay(folder: Path, records: list[Record]) -> None:
    an_hour = {0: 1.0, 1: 1.0, 2: 4.0}
    rent = sum(
        sign * record.time_s * an_hour[record.worker] / 3600
        for record in records
        for kind, sign in ((Joined, -1), (Left, 1))
        if isinstance(record, kind)
    )
    assert Page(folder).facts["cost"] == dollars_text(rent)


def test_evaluations_stand_where_the_run_was(folder: Path, records: list[Record]) -> None:
    samples, expected = 0, []
    for record in records:
        if isinstance(record, Trained):
            samples += record.samples
        elif isinstance(record, Evaluated):
            expected.append((str(record.step), str(samples), f"{record.metrics['loss']:.4g}"))
    rows = Page(folder).rows("Held-out loss: data")
    assert [(row["step"], row["samples"], row["loss"]) for row in rows] == expected


def test_training_losses_are_means_over_the_bins_of_time(folder: Path, records: list[Record]) -> None:
    (read,) = read_runs([folder])
    course = Course(read)
    assert len(course.losses) > 3
    since = 0.0
    for loss in course.losses:
        until = loss.place.time
        inside = [each for each in records if isinstance(each, Trained) and since <= each.time_s < until]
        if until == read.history.end_s:
            inside = [each for each in records if isinstance(each, Trained) and since <= each.time_s]
        values = [each.loss for each in inside for _ in range(each.steps) if each.loss is not None]
        assert loss.steps == len(values)
        assert loss.mean == pytest.approx(fmean(values), rel=1e-12)
        before = [each.samples for each in records if isinstance(each, Trained) and each.time_s < until]
        if until < read.history.end_s:
            assert loss.place.samples == sum(before)
        since = until


def test_a_comparison_has_every_run_and_the_front(tmp_path: Path) -> None:
    folders = [simulated(eventful(steps), tmp_path / "all" / name) for name, steps in (("short", 12), ("long", 24))]
    folders.append(simulated(eventful(18, codec="int8"), tmp_path / "all" / "other"))
    shown = Page(tmp_path / "all")
    rows = {row["run"]: row for row in shown.rows("What each run came to")}
    assert set(rows) == {"short", "long", "other"}
    for each in folders:
        alone = Page(each)
        assert rows[each.name]["samples"] == alone.facts["samples"]
        assert rows[each.name]["loss"] == alone.facts["held-out loss"]
        assert rows[each.name]["dollars"] == alone.facts["cost"]
    summaries = {each.name: json.loads((each / "summary.json").read_text()) for each in folders}
    ends = {name: (summary["seconds"], summary["after"]["loss"]) for name, summary in summaries.items()}
    expected = {
        name: "no"
        if any(other != end and other[0] <= end[0] and other[1] <= end[1] for other in ends.values())
        else "yes"
        for name, end in ends.items()
    }
    assert set(expected.values()) == {"yes", "no"}
    assert {row["run"]: row["on the front"] for row in shown.rows("loss by virtual time: data")} == expected


def test_an_empty_journal_makes_a_page(tmp_path: Path) -> None:
    shown = Page(written(eventful(), tmp_path / "run", []))
    assert "The journal is empty" in shown.text
    assert shown.images == []


def test_one_record_makes_a_page(tmp_path: Path) -> None:
    shown = Page(written(eventful(), tmp_path / "run", lines_of(begin())))
    assert "There is no summary" in shown.text
    assert shown.rows("Workers")[0]["end"] == "there"


def test_a_torn_line_is_left_out_and_said(tmp_path: Path) -> None:
    lines = lines_of(begin(), phase(1.0), phase(2.0))
    shown = Page(written(eventful(), tmp_path / "run", [*lines[:2], lines[2][:40]]))
    assert shown.facts["samples"] == "3"
    assert "cut short" in shown.text
    whole = Page(written(eventful(), tmp_path / "whole", lines))
    assert whole.facts["samples"] == "6"
    assert "cut short" not in whole.text


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    folder = written(eventful(), tmp_path / "run", [*lines_of(begin()), "nonsense\n"])
    with pytest.raises(ConfigError, match="line 2: not a journal record"):
        read_runs([folder])


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no journal\.jsonl in or below"):
        read_runs([tmp_path])


def test_runs_judged_by_different_metrics_are_refused(folder: Path, tmp_path: Path) -> None:
    other = written(Run(), tmp_path / "other", lines_of(begin()))
    with pytest.raises(ConfigError, match="metrics cannot be compared: first by loss, other by bits_per_byte"):
        read_runs([folder, other])


def test_two_folders_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    twin = written(eventful(), tmp_path / folder.name, lines_of(begin()))
    with pytest.raises(ConfigError, match="first: two folders of that name"):
        read_runs([folder, twin])


def test_a_stopped_run_says_why(tmp_path: Path) -> None:
    lines = lines_of(begin(), phase(1.0))
    shown = Page(written(eventful(), tmp_path / "run", lines, stopped="interrupted <by> Ctrl-C"))
    assert "did not come to its end: interrupted <by> Ctrl-C" in shown.text
    assert "Stopped before its end." in shown.text


def test_a_run_that_went_on_from_a_checkpoint_counts_every_byte_once(tmp_path: Path) -> None:
    def round_(number: int, time_s: float, sent_bytes: int) -> Synced:
        members, channel = (0, 1), "sync"
        return Synced(
            time_s=time_s,
            worker=0,
            channel=channel,
            round=number,
            outcome="committed",
            members=members,
            sent_bytes=sent_bytes,
        )

    records = [begin(), phase(1.0), round_(1, 1.5, 100), begin(time_s=9.0), phase(10.0), round_(2, 10.5, 250)]
    shown = Page(written(eventful(), tmp_path / "run", lines_of(*records)))
    assert shown.facts["sent by all"] == "250 B"
    assert shown.facts["workers lost"] == "0"
    (row,) = shown.rows("Workers")
    assert (row["sent"], row["stays"], row["samples"]) == ("250 B", "2", "6")


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    records = [begin(), begin(1), phase(1.0, loss=float("nan")), phase(1.5)]
    records.append(Refused(time_s=1.6, worker=0, source=1, code="norm", count=7))
    records.append(Synced(time_s=2.0, worker=0, channel="sync", round=1, outcome="skipped", members=(0,), sent_bytes=9))
    accounts = {"seconds": {"compute": 1.0, "talk": 0.5, "wait": 0.5}, "sent_bytes": 9, "received_bytes": 0}
    records.append(Left(time_s=2.0, worker=1, reason="crashed", step=3, messages_sent=1, **accounts))
    shown = Page(written(eventful(), tmp_path / "run", lines_of(*records)))
    for said in ("1 local phases had a loss", "100% of worker-rounds were skipped", "7 frames", "not back at the end"):
        assert said in shown.text
    assert shown.rows("Refused") == [{"by": "0", "from": "1", "why": "norm", "count": "7"}]
    assert shown.rows("Degraded and skipped rounds")[0]["absent"] == "1"


def test_a_run_file_that_is_gone_leaves_the_journal(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes((folder / "journal.jsonl").read_bytes())
    shown = Page(tmp_path)
    assert "rule, task, machines and prices are unknown" in shown.text
    assert shown.facts["samples"] == Page(folder).facts["samples"]
    assert "cost" not in shown.facts


def test_a_page_loads_nothing_and_hides_nothing_in_a_script(folder: Path) -> None:
    html = Page(folder).html
    for loading in ("<script", "http:", "https:", "@import", "<img", "<iframe"):
        assert loading not in html


def test_every_picture_can_be_read_out(folder: Path) -> None:
    shown = Page(folder)
    assert len(shown.images) > 10
    assert all(len(label) > 20 for label in shown.images)


def test_the_command_writes_the_page_into_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["decentral", "report", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert (folder / "report.html").read_text(encoding="utf-8") == Page(folder).html


def test_a_page_that_cannot_be_written_is_an_error_of_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = folder / "nowhere" / "page.html"
    monkeypatch.setattr("sys.argv", ["decentral", "report", str(folder), "--out", str(nowhere)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert f"--out {nowhere}: cannot write the page: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("watch", "said"),
    [
        (Watch(spans=True), "every piece of time"),
        (Watch(), "when workers computed; between that they talked or waited"),
    ],
)
def test_a_timeline_says_how_exact_it_is(watch: Watch, said: str, tmp_path: Path) -> None:
    shown = Page(simulated(eventful(), tmp_path / "run", watch))
    assert said in shown.text


def test_a_timeline_has_every_second_that_a_worker_was_there(folder: Path, records: list[Record]) -> None:
    (read,) = read_runs([folder])
    lanes = lanes_of(Course(read), 256)
    assert [lane.name for lane in lanes.lanes] == ["0", "1", "2"]
    for number, lane in enumerate(lanes.lanes):
        left = [each for each in records if isinstance(each, Left) and each.worker == number]
        joined = [each.time_s for each in records if isinstance(each, Joined) and each.worker == number]

        def seconds(shares: list[float]) -> float:
            return sum(
                share * (until - since) for share, (since, until) in zip(shares, pairwise(lanes.edges), strict=True)
            )

        there = sum(each.time_s for each in left) - sum(joined)
        assert seconds(lane.present) == pytest.approx(there, rel=1e-9)
        for activities, name in ((("compute", "evaluate"), "compute"), (("talk",), "talk"), (("wait",), "wait")):
            told = sum(each.seconds[activity] for each in left for activity in activities)
            assert seconds(lane.busy[name]) == pytest.approx(told, rel=1e-9, abs=1e-9)
        assert len(lane.came) == len(joined) - 1
        assert lane.gone == [each.time_s for each in left if each.reason == "crashed"]


def test_replicas_are_as_far_apart_as_their_sketches_say(tmp_path: Path) -> None:
    """Who is many evaluations behind, and who told of one alone, do not count."""
    near, far = torch.ones(1000), torch.ones(1000) + torch.linspace(-0.1, 0.1, 1000)

    def told(time_s: float, worker: int, number: int, params: Tensor) -> Sketched:
        return Sketched(time_s=time_s, worker=worker, number=number, sketch=sketch_of(params))

    both = [told(float(number), worker, number, (near, far)[worker]) for number in range(1, 30) for worker in (0, 1)]
    lines = lines_of(begin(0), begin(1), *both, told(30.0, 0, 2, 5 * near), told(31.0, 0, 30, near))
    (read,) = read_runs([written(cluster(DiLoCo(period=3), 2, 3), tmp_path / "run", lines)])
    apart = Course(read).apart
    assert [each.time_s for each in apart] == [float(number) for number in range(1, 30)]
    truth = float((far - near).norm() / 2 / ((near + far) / 2).norm())
    assert all(each.distance == pytest.approx(truth, rel=0.25) for each in apart)
    figure = spread(Course(read))
    assert figure is not None
    assert "Distance of the replicas" in figure.label


def test_workers_of_a_large_fleet_share_lanes(tmp_path: Path) -> None:
    run = cluster(DiLoCo(period=3), 130, 3)
    lines = lines_of(*(begin(worker) for worker in range(130)), *(phase(1.0, worker=worker) for worker in range(130)))
    (read,) = read_runs([written(run, tmp_path / "run", lines)])
    lanes = lanes_of(Course(read), 96).lanes
    assert [lane.name for lane in lanes] == [f"{first}-{min(first + 2, 129)}" for first in range(0, 129, 3)] + ["129"]
    assert sum(read.history.workers[worker].samples for worker in range(130)) == 390


def test_figures_are_files_too(folder: Path, tmp_path: Path) -> None:
    written_files = write_pictures(read_runs([folder]), tmp_path / "figures")
    names = {path.stem for path in written_files}
    assert {"held-out-by-time", "held-out-by-dollars", "timeline", "rounds", "traffic", "time", "spread"} <= names
    for path in written_files:
        start = path.read_bytes()[:8]
        assert start == b"\x89PNG\r\n\x1a\n" if path.suffix == ".png" else start.startswith(b"<svg")
