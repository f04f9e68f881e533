"""The tokenizer: what is written, what is read back, and how bytes are counted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.prepare import tokenizer as module
from shared.prepare.errors import DataError
from shared.prepare.tokenizer import Tokenizer

TEXTS = [f"naïve café number {n}, 日本語 and {'peace ' * (n % 5)}" for n in range(300)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    shard = tmp_path_factory.mktemp("shards") / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), shard)
    return module.train([shard], 320)


def test_the_vocabulary_is_the_merges_and_four_specials(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == tokenizer.get_vocab_size() == tokenizer.encoding.n_vocab == 320
    assert tokenizer.bos == 316


@given(st.text())
def test_encoding_is_lossless_and_byte_counts_add_up(text: str) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    plain = Tokenizer(ranks)
    [ids] = plain.encode_documents([text], threads=1)
    assert ids[0] == plain.bos
    assert plain.decode(ids[1:]) == text
    assert int(plain.token_bytes()[ids].sum()) == len(text.encode())


def test_bytes_are_the_tokens_own_also_inside_a_character(tokenizer: Tokenizer) -> None:
    [ids] = tokenizer.encode_documents(["日本語 é 🎈"], threads=1)
    assert int(tokenizer.token_bytes()[ids].sum()) == len("日本語 é 🎈".encode())
    partial = tokenizer.encoding.encode_single_token("🎈".encode()[:1])
    assert tokenizer.token_bytes()[partial] == 1


def test_special_tokens_have_no_bytes_and_are_plain_text_when_written_out(tokenizer: Tokenizer) -> None:
    assert (tokenizer.token_bytes()[316:] == 0).all()
    [ids] = tokenizer.encode_documents(["<|bos|>"], threads=1)
    assert ids.count(tokenizer.bos) == 1


def test_it_is_read_back_from_json_and_the_pickle_is_for_others(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    assert np.array_equal(np.load(tmp_path / "token_bytes.npy"), tokenizer.token_bytes())
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert encoding.encode("café") == tokenizer.encoding.encode("café")
    (tmp_path / "tokenizer.pkl").write_bytes(b"not a pickle")
    again = Tokenizer.load(tmp_path)
    assert again.encode_documents(TEXTS, 2) == tokenizer.encode_documents(TEXTS, 1)


def test_another_pre_tokenizer_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    stored = json.loads((tmp_path / "ranks.json").read_text())
    (tmp_path / "ranks.json").write_text(json.dumps({**stored, "pattern": r"\S+"}))
    with pytest.raises(DataError, match="another pre-tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="swarm prepare"):
        Tokenizer.load(tmp_path)


def test_training_reads_no_more_characters_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENIZER_CHARACTERS", 20)
    pq.write_table(pa.table({"text": ["aa" * 10, "zz" * 500]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="add text"):  # twenty characters of `a` give few merges
        module.train([tmp_path / "a.parquet"], 300)
