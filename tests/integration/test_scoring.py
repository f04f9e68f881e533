"""evaluate_bpb in a real process: right, independent of batch size, and not to be talked into anything."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shared.prepare.packing import open_rows, rows_folder, tokenizer_folder
from shared.prepare.tokenizer import Tokenizer
from tests.conftest import SMALL, Bench

SETUP = """
import json, sys
import torch
from prepare.torch_backend import *
torch.manual_seed(0)
table = torch.randn(VOCAB_SIZE, VOCAB_SIZE)
class Bigram(torch.nn.Module):
    def forward(self, tokens):
        return table[tokens]
tokenizer = load_tokenizer()
calls = []
def later(tokens):
    calls.append(1)
    return table[tokens] + (table[torch.roll(tokens, -1, 1)] if len(calls) > 3 else 0)
"""


def test_the_score_agrees_with_one_computed_by_hand(bench: Bench) -> None:
    """Pure Python, from the logits: log-softmax, nats of the targets, bytes of the targets' own tokens."""
    code = SETUP + "print(evaluate_bpb(Bigram(), tokenizer, 4)); print(json.dumps(table.tolist()))"
    done = bench.python(code)
    lines = done.stdout.splitlines()
    logits = json.loads(lines[-1])
    log_z = [max(row) + math.log(math.fsum(math.exp(x - max(row)) for x in row)) for row in logits]
    token_bytes = Tokenizer.load(tokenizer_folder(bench.cache, SMALL, 512)).token_bytes().tolist()
    rows = open_rows(rows_folder(bench.cache, SMALL, "tiny"), "val", 257).tolist()
    nats, size = [], 0
    for row in rows:
        for token, target in pairwise(row):
            if token_bytes[target] > 0:
                nats.append(log_z[token] - logits[token][target])
                size += token_bytes[target]
    assert len(rows) >= 5
    assert float(lines[-2]) == pytest.approx(math.fsum(nats) / (math.log(2) * size), abs=1e-6)


def test_the_batch_size_changes_neither_rows_nor_score(bench: Bench, tmp_path: Path) -> None:
    results = []
    for batch_size in (1, 3, 16):
        record = tmp_path / f"record-{batch_size}"
        bench.python(SETUP + f"evaluate_bpb(Bigram(), tokenizer, {batch_size})", SWARM_RECORD=str(record))
        [result] = [e for e in map(json.loads, record.read_text().splitlines()) if e["event"] == "result"]
        results.append(result)
    rows = open_rows(rows_folder(bench.cache, SMALL, "tiny"), "val", 257)
    lengths = Tokenizer.load(tokenizer_folder(bench.cache, SMALL, 512)).token_bytes()[np.asarray(rows[:, 1:])]
    for result in results:
        assert result["rows"] == len(rows)
        assert result["bytes"] == int(lengths.sum())
        assert result["tokens"] == int((lengths > 0).sum())
        assert result["score"] == pytest.approx(results[0]["score"], abs=1e-9)


REFUSED = {
    "the model looks ahead": "lambda t: table[t] + table[torch.roll(t, -1, 1)]",
    "the model looks ahead: changing": "lambda t: table[t] + t.float().mean(1)[:, None, None]",
    "MetricError": "later",  # well-behaved in its first three calls
    "differ by": "lambda t: table[t] + torch.randn(*t.shape, VOCAB_SIZE)",
    "not a score": "lambda t: table[t] * float('nan')",
    "expected logits": "lambda t: table[t].mean()",
    "returned tuple": "lambda t: (table[t], None)",
}


@pytest.mark.parametrize(("complaint", "model"), REFUSED.items())
def test_a_model_that_cannot_be_scored_fairly_is_refused(bench: Bench, complaint: str, model: str) -> None:
    done = bench.python(SETUP + f"print(evaluate_bpb({model}, tokenizer, 1))")
    assert done.returncode == 1
    assert complaint in done.stderr.splitlines()[-1]


def test_a_model_that_varies_a_little_between_calls_is_not_taken_for_one_that_looks_ahead(bench: Bench) -> None:
    noisy = "lambda t: table[t] + 1e-3 * torch.randn(*t.shape, VOCAB_SIZE)"
    done = bench.python(SETUP + f"print(evaluate_bpb({noisy}, tokenizer, 4))")
    assert done.returncode == 0, done.stderr


def test_a_run_is_scored_once(bench: Bench) -> None:
    done = bench.python(SETUP + "evaluate_bpb(Bigram(), tokenizer, 4); evaluate_bpb(Bigram(), tokenizer, 4)")
    assert done.returncode == 1
    assert "one model per run" in done.stderr.splitlines()[-1]


def test_fewer_tokens_than_asked_for_are_said_so(bench: Bench) -> None:
    done = bench.python(SETUP + "evaluate_bpb(Bigram(), tokenizer, 4)")
    assert "fewer than the 131072 asked for; all scored" in done.stdout


LOADER = """
seen = []
loader = make_dataloader(tokenizer, {batch}, {length}, "train")
for _ in range({count}):
    inputs, targets, epoch = next(loader)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    seen.append([inputs.tolist(), targets[:, -1].tolist(), epoch])
print(json.dumps(seen))
"""


def test_batches_are_the_packed_rows_in_order_with_epochs(bench: Bench) -> None:
    rows = open_rows(rows_folder(bench.cache, SMALL, "tiny"), "train", 257)
    count = len(rows) // 64 + 2
    done = bench.python(SETUP + LOADER.format(batch=64, length=256, count=count))
    batches = json.loads(done.stdout.splitlines()[-1])
    given = np.concatenate([inputs for inputs, _, _ in batches])
    index = np.arange(len(given)) % len(rows)
    assert np.array_equal(given, rows[index, :-1])
    assert [epoch for _, _, epoch in batches] == [i * 64 // len(rows) + 1 for i in range(count)]
    assert batches[-1][2] == 2


def test_a_shorter_sequence_length_uses_every_token_of_a_row(bench: Bench) -> None:
    rows = open_rows(rows_folder(bench.cache, SMALL, "tiny"), "train", 257)
    done = bench.python(SETUP + LOADER.format(batch=6, length=64, count=2))
    batches = json.loads(done.stdout.splitlines()[-1])
    given = np.concatenate([inputs for inputs, _, _ in batches])
    assert np.array_equal(given.reshape(3, 256), rows[:3, :-1])
    lasts = np.concatenate([last for _, last, _ in batches])
    assert np.array_equal(lasts.reshape(3, 4), rows[:3, 64::64])


def test_other_sequence_lengths_are_refused(bench: Bench) -> None:
    done = bench.python(SETUP + "make_dataloader(tokenizer, 4, 100, 'train')")
    assert "seq_len 100 does not divide MAX_SEQ_LEN 256" in done.stderr
