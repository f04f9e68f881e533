"""Best-fit packing: full rows, nothing twice, every lost token counted, the same rows however it is run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.prepare import packing
from shared.prepare.errors import DataError

BOS = 0

documents = st.lists(st.lists(st.integers(1, 500), max_size=30).map(lambda ids: [BOS, *ids]), max_size=60)


@given(documents, st.integers(2, 20), st.integers(1, 50))
def test_rows_are_full_start_with_bos_and_no_token_goes_uncounted(
    texts: list[list[int]], row_tokens: int, buffer: int
) -> None:
    rows = list(packing.best_fit(texts, row_tokens, buffer))
    full, last = rows[:-1], rows[-1]
    assert all(len(row) == row_tokens and row[0] == BOS for row, _ in full)
    assert last[0] == []
    kept = sum(len(row) for row, _ in full)
    assert kept + sum(lost for _, lost in rows) == sum(map(len, texts))


@given(documents, st.integers(2, 20))
def test_every_document_starts_in_at_most_one_row(texts: list[list[int]], row_tokens: int) -> None:
    marked = [[BOS, 1000 + i, *text[1:]] for i, text in enumerate(texts)]
    rows = [token for row, _ in packing.best_fit(marked, row_tokens, 10) for token in row if token >= 1000]
    assert len(rows) == len(set(rows))


def test_the_largest_document_that_fits_goes_first_and_the_shortest_is_cropped() -> None:
    texts = [[BOS] + [n] * (n - 1) for n in (3, 6, 4, 9)]
    rows = list(packing.best_fit(texts, 10, 10))
    assert rows[0] == ([BOS, *[9] * 8, BOS], 2)  # 9 fits; then nothing fits the last place: the 3 is cropped
    assert rows[1] == ([BOS, *[6] * 5, BOS, *[4] * 3], 0)
    assert rows[2] == ([], 0)


def test_documents_of_one_length_keep_their_order() -> None:
    texts = [[BOS, n] for n in range(1, 9)]
    packed = [token for row, _ in packing.best_fit(texts, 4, 8) for token in row if token]
    assert packed == list(range(1, 9))


def shards(folder: Path, groups: list[list[str]]) -> None:
    folder.mkdir(parents=True)
    for number, texts in enumerate(groups):
        pq.write_table(pa.table({"text": texts}), folder / f"shard_{number:05d}.parquet", row_group_size=64)


def words(count: int, start: int = 0) -> list[str]:
    return [f"the year {n} saw {n * 7 % 97} things and {'more ' * (n % 9)}peace" for n in range(start, start + count)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set `years` and a small profile beside the real ones, so that a vocabulary trains on a few kilobytes."""
    small = packing.Profile("small", 32, 1.0, 640, 300, 4, 100, 1.0, 1.0, 10.0, 1)
    monkeypatch.setitem(packing.PROFILES, "small", small)
    shards(tmp_path / "data" / "years", [words(400), words(300, 400), words(100, 700)])
    return tmp_path


def silent(stage: str, done: int, of: int) -> None:
    pass


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_the_rows_are_the_same_with_any_number_of_threads(cache: Path, tmp_path: Path, threads: int) -> None:
    one = packing.prepare(cache, "small", "years", None, 1, silent)
    rows = packing.rows_folder(cache, "years", "small")
    before = {side: packing.sha256_of(rows / f"{side}.bin") for side in ("train", "val")}
    for path in rows.iterdir():
        path.unlink()
    again = packing.prepare(cache, "small", "years", None, threads, silent)
    assert again == one
    assert {side: packing.sha256_of(rows / f"{side}.bin") for side in ("train", "val")} == before


def test_rows_are_read_back_as_written(cache: Path) -> None:
    manifest = packing.prepare(cache, "small", "years", None, 1, silent)
    rows = packing.open_rows(packing.rows_folder(cache, "years", "small"), "train", manifest.row_tokens)
    assert rows.shape == (manifest.train.rows, 33)
    assert rows.dtype == np.uint16
    assert (rows[:, 0] == 296).all()  # BOS: the first id after 296 merges
    assert int(rows.max()) < 300
    with pytest.raises(ValueError):
        rows[0, 0] = 1  # read-only


def test_validation_stops_at_the_evaluation_budget_and_counts_only_what_it_packed(cache: Path) -> None:
    manifest = packing.prepare(cache, "small", "years", None, 1, silent)
    assert manifest.validation.rows == 640 // 32
    assert manifest.validation.tokens_kept == 20 * 33
    assert manifest.validation.lost < 0.2


def test_an_order_for_fewer_shards_packs_anew(cache: Path) -> None:
    both = packing.prepare(cache, "small", "years", None, 1, silent)
    one = packing.prepare(cache, "small", "years", 1, 1, silent)
    assert [shard.name for shard in both.train.shards] == ["shard_00000.parquet", "shard_00001.parquet"]
    assert [shard.name for shard in one.train.shards] == ["shard_00000.parquet"]
    assert one.train.rows < both.train.rows
    assert packing.Manifest.load(packing.rows_folder(cache, "years", "small")) == both  # in folders of their own


def test_two_at_once_make_the_same_rows(cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: packing.prepare(cache, "small", "years", None, 1, silent), range(2)))
    assert made[0] == made[1]
    one = packing.sha256_of(packing.rows_folder(cache, "years", "small") / "train.bin")
    for path in packing.rows_folder(cache, "years", "small").iterdir():
        path.unlink()
    packing.prepare(cache, "small", "years", None, 1, silent)
    assert packing.sha256_of(packing.rows_folder(cache, "years", "small") / "train.bin") == one


def test_a_second_call_does_nothing_but_look(cache: Path) -> None:
    packing.prepare(cache, "small", "years", None, 1, silent)
    stages: list[str] = []
    packing.prepare(cache, "small", "years", None, 1, lambda stage, done, of: stages.append(stage))
    assert stages == []


def test_shards_are_packed_in_order_and_one_after_the_other(cache: Path) -> None:
    """Packing the first shard alone gives the first rows of packing both: that is what makes a resume possible."""
    packing.prepare(cache, "small", "years", 1, 1, silent)
    packing.prepare(cache, "small", "years", 2, 1, silent)
    one, two = (packing.rows_folder(cache, "years", "small", n) / "train.bin" for n in (1, 2))
    assert two.read_bytes().startswith(one.read_bytes())


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [([["a b c"]], "1 parquet files"), ([["a"], ["b"]], "only .* tokens")],
)
def test_unusable_data_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[list[str]], complaint: str
) -> None:
    monkeypatch.setitem(
        packing.PROFILES, "small", packing.Profile("small", 32, 1.0, 640, 300, 4, 100, 1.0, 1.0, 10.0, 1)
    )
    shards(tmp_path / "data" / "poor", groups)
    with pytest.raises(DataError, match=complaint):
        packing.prepare(tmp_path, "small", "poor", None, 1, silent)


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'nowhere' is not in .*swarm prepare --data PATH"):
        packing.prepare(tmp_path, "tiny", "nowhere", None, 1, silent)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 40), min_size=200, max_size=400))
def test_short_documents_of_many_lengths_lose_little(lengths: list[int]) -> None:
    rows = list(packing.best_fit([[BOS] * n for n in lengths], 256, 1000))
    lost = sum(cropped for row, cropped in rows if row)
    assert lost <= 0.05 * sum(lengths) + 40


def test_progress_names_each_shard_once(cache: Path) -> None:
    told: list[tuple[str, int, int]] = []
    packing.prepare(cache, "small", "years", None, 1, lambda *step: told.append(step))
    train = [step for step in told if step[0] == "train"]
    assert train == [("train", 0, 2), ("train", 1, 2)]
    assert all(before <= after for before, after in pairwise(step[1] for step in train))
