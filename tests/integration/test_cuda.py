"""The template's attention on a CUDA device: compiled FlexAttention windows are exactly the reference's windows.

Run on a machine with a GPU: `pytest -m gpu`. Needs neither data nor tokenizer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.gpu

ATTENTION = """
import torch
import train

LENGTH, WINDOW, SPIKE = 2048, 1024, 100
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, LENGTH, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
train.window_mask(LENGTH, WINDOW)
attend = torch.compile(train.attend, dynamic=False)

distance = torch.arange(LENGTH, device="cuda")[:, None] - torch.arange(LENGTH, device="cuda")[None, :]
for window in (WINDOW, LENGTH):
    seen = (distance >= 0) & (distance <= window)
    scores = (q.float() @ k.float().mT / 128**0.5).masked_fill(~seen, float("-inf"))
    expected = scores.softmax(-1) @ v.float()
    error = (attend(q, k, v, window).float() - expected).norm() / expected.norm()
    print(f"window {window}: relative error {error:.1e}")
    assert error < 1e-2

# the edges, to the position: a huge value is seen by the queries from its own place to WINDOW later, by no others
v.zero_()
v[:, :, SPIKE] = 1e4
seen = attend(torch.zeros_like(q), k, v, WINDOW)[0, 0, :, 0] > 1
assert seen.nonzero().flatten().tolist() == list(range(SPIKE, SPIKE + WINDOW + 1))
print("edges exact")
"""


def test_windows_are_those_of_a_masked_softmax_to_the_position(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    (tmp_path / "prepare").symlink_to(ROOT / "shared" / "prepare", target_is_directory=True)
    (tmp_path / "train.py").write_text((ROOT / "shared" / "train_template" / "torch" / "train.py").read_text())
    (tmp_path / "attention.py").write_text(ATTENTION)
    done = subprocess.run(
        [sys.executable, "attention.py"],
        cwd=tmp_path,
        env={**os.environ, "SWARM_PROFILE": "h100"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "edges exact" in done.stdout
