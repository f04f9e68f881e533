"""Documents: the embedded text and folders of parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.prepare import data
from shared.prepare.errors import DataError

text = st.text(alphabet=st.sampled_from("ab,;. !?\néß日"), max_size=400)


@given(text, st.integers(5, 60))
def test_cut_documents_are_short_and_hold_every_word(whole: str, longest: int) -> None:
    pieces = data.cut(whole, longest)
    assert all(0 < len(piece) <= longest for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(whole.split())


def test_cuts_fall_on_sentence_ends_where_sentences_are_short() -> None:
    pieces = data.cut("One two. Three four! Five? Six seven eight. " * 20, 64)
    assert all(piece[-1] in ".!?" for piece in pieces)


def test_the_embedded_text_is_split_by_whole_address(tmp_path: Path) -> None:
    data.write_embedded(tmp_path / "sotu", 160)
    folder = data.Folder.open(tmp_path / "sotu")
    validation = [t for group in data.documents(folder.validation) for t in group]
    training = {t for shard in folder.train for group in data.documents(shard) for t in group}
    addresses = pq.read_table(Path(data.__file__).with_name("sotu.parquet"))["text"].to_pylist()
    held_out = [a for i, a in enumerate(addresses) if i % data.VALIDATION_EVERY == data.VALIDATION_EVERY // 2]
    assert [piece for address in held_out for piece in data.cut(address, 160)] == validation
    long_ones = {t for t in validation if len(t) > 80}
    assert len(long_ones) > 1000
    assert len(long_ones & training) <= 0.01 * len(long_ones)  # formulas that presidents repeat
    assert len(folder.train) == data.EMBEDDED_SHARDS


def test_the_embedded_text_is_written_once_and_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        data.write_embedded(tmp_path / name, 160)
    first = [list(data.documents(p)) for p in sorted((tmp_path / "a").iterdir())]
    assert first == [list(data.documents(p)) for p in sorted((tmp_path / "b").iterdir())]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    data.write_embedded(tmp_path / "a", 160)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}


def test_documents_come_by_row_group(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": [f"t{i}" for i in range(10)]}), path, row_group_size=4)
    assert [len(group) for group in data.documents(path)] == [4, 4, 2]


@pytest.mark.parametrize(
    ("columns", "complaint"),
    [({"words": ["a"]}, "no column `text`, only words"), ({"text": [1]}, "`text` is int64, expected string")],
)
def test_a_shard_without_text_is_refused(tmp_path: Path, columns: dict[str, list[object]], complaint: str) -> None:
    for number in range(2):
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    with pytest.raises(DataError, match=complaint):
        data.Folder.open(tmp_path)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not a readable parquet file"):
        data.Folder.open(tmp_path)


def test_one_shard_is_too_few(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "only.parquet")
    with pytest.raises(DataError, match="1 parquet files; at least two"):
        data.Folder.open(tmp_path)
