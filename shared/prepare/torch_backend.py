"""Prepare for PyTorch: device, batches, clock and score. All that a torch train.py imports.

CUDA, Apple's MPS and CPU; torch 2.11 and 2.13.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F

from . import bpb
from .errors import MetricError
from .identity import digest
from .packing import Rows, open_rows, rows_folder, tokenizer_folder
from .run import RECORD, RUN, Clock
from .tokenizer import Tokenizer

MAX_SEQ_LEN: Final = RUN.profile.max_seq_len
TIME_BUDGET: Final = RUN.budget_s
EVAL_TOKENS: Final = RUN.profile.eval_tokens
VOCAB_SIZE: Final = RUN.profile.vocab_size
SEED: Final = RUN.seed

DEVICE: Final = torch.device(
    "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
)
if RUN.profile.threads:
    torch.set_num_threads(RUN.profile.threads)

clock: Final = Clock(RUN, RECORD)

_ROWS = rows_folder(RUN.cache, RUN.data, RUN.profile.name, RUN.train_shards)
_TOKENIZER = tokenizer_folder(RUN.cache, RUN.data, RUN.profile.vocab_size)
_LOSS_SLICE = 1 << 16  #: tokens whose fp32 log-probabilities exist at once during evaluation

#: Dense bf16 peak, FLOP/s, by a part of the device's name; 989.5 is the reference's figure for the H100.
_PEAK_FLOPS = {"H100": 989.5e12, "H200": 989.5e12, "H800": 989.5e12, "A100": 312e12, "4090": 165.2e12}

Batch = tuple[torch.Tensor, torch.Tensor, int]


def load_tokenizer() -> Tokenizer:
    """The campaign's tokenizer. Raises DataError before `swarm prepare`."""
    return Tokenizer.load(_TOKENIZER)


def synchronize() -> None:
    """Waits until the device has finished what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    elif DEVICE.type == "mps":
        torch.mps.synchronize()


def peak_memory_mb() -> float:
    """Peak memory of this process, MiB: allocated on the accelerator, resident on a CPU."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if DEVICE.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def peak_flops() -> float:
    """The device's dense bf16 peak, FLOP/s; 0 where it is not known."""
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else ""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), 0.0)


def make_dataloader(
    tokenizer: Tokenizer, batch_size: int, seq_len: int, split: str, buffer_size: int = 1000
) -> Iterator[Batch]:
    """Endless batches (inputs, targets, epoch), both int64 of shape (batch_size, seq_len) on the device.

    A slice of the rows that `swarm prepare` packed; the same order in every run. On CUDA the next batch is copied while
    the device computes. `seq_len` may be a divisor of MAX_SEQ_LEN: each row is then several sequences. `tokenizer` and
    `buffer_size` belong to the reference's signature; packing is done, so they change nothing here.
    Raises ValueError for another seq_len or split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}: 'train' or 'val'")
    if MAX_SEQ_LEN % seq_len:
        raise ValueError(f"seq_len {seq_len} does not divide MAX_SEQ_LEN {MAX_SEQ_LEN}")
    batches = _host_batches(open_rows(_ROWS, split, MAX_SEQ_LEN + 1), batch_size, seq_len)
    RECORD.tell("batch", split=split)
    return _on_cuda(batches) if DEVICE.type == "cuda" else _on_host(batches)


_epochs = 0.0  # passes over the training rows that train.py has been given; reported with the result


def _host_batches(rows: Rows, batch_size: int, seq_len: int) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """(rows of seq_len + 1 tokens, epoch), uint16, wrapping at the end of the rows. The epoch counts from 1."""
    global _epochs
    parts = (rows.shape[1] - 1) // seq_len
    sequences = len(rows) * parts
    at = 0
    while True:
        index = np.arange(at, at + batch_size)
        starts = index % parts * seq_len
        which = index // parts % len(rows)
        if parts == 1 and which[-1] >= which[0]:
            chunk = np.asarray(rows[which[0] : which[-1] + 1])
        else:
            chunk = rows[which[:, None], starts[:, None] + np.arange(seq_len + 1)]
        epoch = at // sequences + 1
        at += batch_size
        clock.drawn += batch_size * seq_len
        _epochs = max(_epochs, at / sequences)
        yield chunk, epoch


def _split(chunk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int16 rows (a view of uint16) to int64 inputs and targets."""
    tokens = chunk.long() & 0xFFFF
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _on_host(batches: Iterator[tuple[np.ndarray[Any, Any], int]]) -> Iterator[Batch]:
    for chunk, epoch in batches:
        yield *_split(torch.from_numpy(chunk.view(np.int16).copy()).to(DEVICE)), epoch


def _on_cuda(batches: Iterator[tuple[np.ndarray[Any, Any], int]]) -> Iterator[Batch]:
    """One batch ahead: copied from pinned memory on a stream of its own, with an event that the consumer waits on."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    pinned: list[torch.Tensor] = []
    ready = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def send(turn: int) -> tuple[torch.Tensor, int]:
        chunk, epoch = next(batches)
        host = torch.from_numpy(chunk.view(np.int16).copy())
        if len(pinned) < 2:
            pinned.append(torch.empty_like(host, pin_memory=True))
        ready[turn].synchronize()  # the copy that last used this buffer is over
        pinned[turn].copy_(host)
        with torch.cuda.stream(stream):
            sent = pinned[turn].to(DEVICE, non_blocking=True)
            ready[turn].record(stream)
        return sent, epoch

    turn = 0
    waiting = send(turn)
    while True:
        sent, epoch = waiting
        torch.cuda.current_stream().wait_event(ready[turn])
        sent.record_stream(torch.cuda.current_stream())
        turn = 1 - turn
        waiting = send(turn)
        yield *_split(sent), epoch


_scored = False


@torch.no_grad()
def evaluate_bpb(model: Callable[[torch.Tensor], torch.Tensor], tokenizer: Tokenizer, batch_size: int) -> float:
    """The run's score: bits per byte over the campaign's fixed validation rows. Once per run.

    `model(inputs)` takes int64 (batch, seq_len) and returns logits (batch, seq_len, >= vocab_size); the loss is
    computed here. The rows do not depend on batch_size; a batch that does not fit in memory is tried again at half the
    size. Ends training: what the clock and the runner measure stops here.
    Raises MetricError for a model that looks ahead, returns no logits, or scores non-finite; RuntimeError the second
    time (choosing among several scores would be choosing on the validation rows).
    """
    global _scored
    if _scored:
        raise RuntimeError("evaluate_bpb scores one model per run")
    _scored = True
    synchronize()
    RECORD.tell("evaluate", training_s=clock.training_s, steps=clock.steps, drawn=clock.drawn)
    if isinstance(model, torch.nn.Module):
        model.eval()
    rows = bpb.scored_rows(open_rows(_ROWS, "val", MAX_SEQ_LEN + 1), EVAL_TOKENS)
    if len(rows) * MAX_SEQ_LEN < EVAL_TOKENS:
        print(
            f"validation text has {len(rows) * MAX_SEQ_LEN} tokens, fewer than the {EVAL_TOKENS} asked for; all scored"
        )
    batch_size = min(batch_size, len(rows))
    while True:
        try:
            score = _score(model, rows, batch_size)
            break
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2
            torch.cuda.empty_cache()
            print(f"evaluation did not fit in memory; again with batches of {batch_size}")
    if _epochs > 1:
        print(f"note: training went over the rows {_epochs:.2f} times")
    RECORD.tell(
        "result",
        drawn=clock.drawn,
        score=score.bpb,
        nats=score.nats,
        bytes=score.bytes,
        tokens=score.tokens,
        rows=score.rows,
        epochs=_epochs,
        training_s=clock.training_s,
        profile=RUN.profile.name,
        budget_s=RUN.budget_s,
        seed=RUN.seed,
        steps_mode=RUN.steps is not None,
        digest=digest(_ROWS, _TOKENIZER),
    )
    return score.bpb


def _logits(model: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    logits = model(inputs)
    shape: tuple[int, ...] = tuple(getattr(logits, "shape", ()))
    if len(shape) != 3 or shape[:2] != tuple(inputs.shape) or shape[2] < VOCAB_SIZE:
        raise MetricError(
            f"model(inputs) returned {shape or type(logits).__name__}, "
            f"expected logits ({inputs.shape[0]}, {inputs.shape[1]}, {VOCAB_SIZE})"
        )
    return logits


def _tokens(chunk: Rows) -> torch.Tensor:
    return torch.from_numpy(chunk.view(np.int16).copy()).to(DEVICE).long() & 0xFFFF


def _score(model: Callable[[torch.Tensor], torch.Tensor], rows: Rows, batch_size: int) -> bpb.Score:
    token_bytes = torch.from_numpy(Tokenizer.load(_TOKENIZER).token_bytes()).to(DEVICE).long()
    probes = bpb.Probes(len(rows), MAX_SEQ_LEN)
    nats, counted_bytes, counted = 0.0, 0, 0
    for at in range(0, len(rows), batch_size):
        tokens = _tokens(rows[at : at + batch_size])
        real = len(tokens)
        if real < batch_size:  # the last batch is filled up, so that a compiled model sees one shape
            tokens = torch.cat([tokens, tokens[:1].expand(batch_size - real, -1)])
        cuts = [probes.cuts.get(row, MAX_SEQ_LEN) for row in range(at, at + real)]
        cuts += [MAX_SEQ_LEN] * (batch_size - real)
        logits = _logits_probed(model, tokens[:, :-1], cuts, probes)[:real].flatten(0, 1)
        targets = tokens[:real, 1:].flatten()
        lengths = token_bytes[targets]
        for part in range(0, len(targets), _LOSS_SLICE):
            piece = slice(part, part + _LOSS_SLICE)
            losses = F.cross_entropy(logits[piece].float(), targets[piece], reduction="none")
            nats += float(losses[lengths[piece] > 0].cpu().double().sum())
        counted_bytes += int(lengths.sum())
        counted += int((lengths > 0).sum())
    return bpb.Score(nats, counted_bytes, counted, len(rows))


def _logits_probed(
    model: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, cuts: list[int], probes: bpb.Probes
) -> torch.Tensor:
    """The inputs' logits. Rows whose cut lies inside are also run with other tokens from there on, before or after:
    what stands before the cut must not move, beyond what the model varies by between two calls."""
    if all(cut == MAX_SEQ_LEN for cut in cuts):
        return _logits(model, inputs)
    changed = torch.from_numpy(probes.change(inputs.cpu().numpy(), cuts, VOCAB_SIZE)).to(DEVICE)
    if probes.first():
        other = _logits(model, changed)
        logits = _logits(model, inputs)
    else:
        logits = _logits(model, inputs)
        other = _logits(model, changed)
    moved = _difference(logits, other, cuts)
    if moved > bpb.LEAK_TOLERANCE:
        noise = _difference(logits, _logits(model, inputs), cuts)
        if noise > bpb.OWN_NOISE:
            raise MetricError(f"the model's logits differ by {noise:.3g} between two calls on the same input")
        if moved > bpb.LEAK_TOLERANCE + 3 * noise:
            raise MetricError(f"the model looks ahead: changing later tokens moved earlier logits by {moved:.3g}")
    return logits


def _difference(one: torch.Tensor, other: torch.Tensor, cuts: list[int]) -> float:
    """The largest difference before the cuts, over the rows that have one; row by row, to save memory."""
    return max(
        float((one[row, :cut].float() - other[row, :cut].float()).abs().max())
        for row, cut in enumerate(cuts)
        if cut < MAX_SEQ_LEN
    )
