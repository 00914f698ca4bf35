"""ByteGPT: its split of a corpus, its streams of windows, and that it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from decentral.errors import TaskError
from decentral.tasks import ByteGPT
from decentral.tasks.corpus import is_heldout

SENTENCE = "the quick brown fox jumps over the lazy dog and goes home\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty files, each of one letter of its own repeated, so that every byte tells which file it is from."""
    for number in range(40):
        (tmp_path / f"part{number:02}.txt").write_bytes(bytes([65 + number]) * 100)
    return tmp_path


def tiny(**fields: object) -> ByteGPT:
    return ByteGPT.model_validate({"width": 16, "depth": 1, "heads": 2, "context": 32, **fields})


def heldout_letters(corpus: Path) -> set[int]:
    return {65 + number for number in range(40) if is_heldout(f"part{number:02}.txt", 0.25)}


def test_the_split_does_not_depend_on_the_process_or_the_place() -> None:
    # Pinned: a change here silently moves text between training and evaluation of everybody's runs.
    heldout = [path for path in ("a.txt", "b.txt", "c/d.py", "e.md", "f/é.md", "g/h.txt") if is_heldout(path, 0.7)]
    assert heldout == ["b.txt", "e.md", "g/h.txt"]


def test_train_and_heldout_files_are_disjoint_and_cover_the_corpus(corpus: Path) -> None:
    task = tiny(corpus=corpus, heldout_fraction=0.25)
    trained = set(task.batch(0, 0, 2000).flatten().tolist())
    heldout = heldout_letters(corpus)
    assert 4 <= len(heldout) <= 16
    assert trained == set(range(65, 105)) - heldout


def test_evaluation_reads_only_heldout_text(corpus: Path) -> None:
    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.seen: set[int] = set()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            self.seen.update(tokens.flatten().tolist())
            return torch.zeros(*tokens.shape, 256) * self.scale

    model = Recorder()
    answer = tiny(corpus=corpus, heldout_fraction=0.25, eval_windows=50).evaluate(model)
    assert model.seen == heldout_letters(corpus)
    assert answer == {"loss": pytest.approx(math.log(256)), "bits_per_byte": pytest.approx(8.0)}


def test_samples_do_not_depend_on_how_they_are_cut_into_batches() -> None:
    task = ByteGPT()
    whole = task.batch(3, 0, 8)
    assert whole.shape == (8, task.context + 1)
    assert whole.dtype == torch.uint8
    assert torch.equal(whole, torch.cat((task.batch(3, 0, 4), task.batch(3, 4, 4))))
    assert torch.equal(whole, torch.cat([task.batch(3, index, 1) for index in range(8)]))
    assert torch.equal(task.batch(3, 10**12, 4)[1:], task.batch(3, 10**12 + 1, 3))


def test_workers_and_samples_differ() -> None:
    windows = torch.cat([ByteGPT().batch(worker, 0, 16) for worker in range(4)])
    assert len(torch.unique(windows, dim=0)) == 64


def test_the_last_window_of_the_text_can_be_drawn(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(range(68)))
    task = tiny(corpus=file, heldout_fraction=0.5)  # 34 bytes on each side: two windows of 33
    assert sorted({window[0].item() for window in task.batch(0, 0, 64)}) == [0, 1]


def test_one_file_is_split_by_bytes_with_its_end_held_out(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"a" * 900 + b"b" * 100)
    task = tiny(corpus=file)
    assert set(task.batch(0, 0, 500).flatten().tolist()) == {ord("a")}


def test_hidden_files_and_other_suffixes_are_left_out(corpus: Path) -> None:
    (corpus / ".git").mkdir()
    (corpus / ".git" / "notes.txt").write_bytes(b"!" * 9999)
    (corpus / ".secret.txt").write_bytes(b"!" * 9999)
    (corpus / "table.csv").write_bytes(b"!" * 9999)
    assert ord("!") not in tiny(corpus=corpus).batch(0, 0, 500)


def test_the_default_model_has_about_a_million_parameters() -> None:
    assert 0.8e6 < sum(parameter.numel() for parameter in ByteGPT().model().parameters()) < 1.1e6


def test_the_same_seed_gives_the_same_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(7)
        weights.append(torch.cat([parameter.flatten() for parameter in tiny().model().parameters()]))
    assert torch.equal(*weights)


def test_a_byte_is_predicted_from_earlier_bytes_only() -> None:
    task = tiny()
    model = task.model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(256, (2, 32))
    changed = tokens.clone()
    changed[:, 20:] = torch.randint(256, (2, 12))
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2)


def test_it_learns(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(SENTENCE * 100)
    task = tiny(corpus=file, width=32, eval_windows=8)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.no_grad():
        assert task.evaluate(model)["bits_per_byte"] > 7.5
    for step in range(100):
        optimizer.zero_grad()
        task.loss(model, task.batch(0, 8 * step, 8)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        answer = task.evaluate(model)
    assert answer["bits_per_byte"] < 1.0
    assert answer["bits_per_byte"] == pytest.approx(answer["loss"] / math.log(2))


def test_evaluation_chunks_do_not_change_the_mean(corpus: Path) -> None:
    task = tiny(corpus=corpus, eval_windows=70)
    model = task.model()
    with torch.no_grad():
        loss = task.evaluate(model)["loss"]
        text = task._corpus().heldout
        starts = torch.linspace(0, len(text) - 33, 70, dtype=torch.float64).long().tolist()
        windows = torch.stack([text[start : start + 33] for start in starts])
        assert loss == pytest.approx(task.loss(model, windows).item(), rel=1e-5)


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="nowhere does not exist; it must be a folder or a file"):
        tiny(corpus=tmp_path / "nowhere").batch(0, 0, 1)


def test_a_folder_without_text_is_named_with_the_suffixes(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("1,2")
    with pytest.raises(TaskError, match=r"ends in \.txt, \.md, \.py; name others with `suffixes`"):
        tiny(corpus=tmp_path).batch(0, 0, 1)


@pytest.mark.parametrize(("size", "part"), [(10, "train"), (60, "heldout"), (0, "train")])
def test_a_corpus_too_small_for_a_window_is_refused(tmp_path: Path, size: int, part: str) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(b"x" * size)
    with pytest.raises(TaskError, match=rf"the {part} part of corpus .*text\.txt has \d+ bytes.*context \+ 1 = 33"):
        tiny(corpus=file).batch(0, 0, 1)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValidationError, match=r"width=100 must be a multiple of 2 \* heads = 16"):
        ByteGPT(width=100, heads=8)
