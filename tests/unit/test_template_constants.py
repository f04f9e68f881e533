"""The torch template's defaults against the reference's tables, and its size against the reference's sample output.

Where the reference disagrees with its own sample output, the sample wins: DEPTH 8, ASPECT_RATIO 64, HEAD_DIM 128, width
512, 50.3M parameters, 128 rows a pass, 2^19 tokens a step.
"""

from __future__ import annotations

import pytest

from shared import pyedit
from shared.prepare.constants import MAX_SHARD, PROFILES, STARTUP_EXCLUDE_STEPS, VAL_SHARD
from tests.conftest import ROOT

TORCH = (ROOT / "shared" / "train_template" / "torch" / "train.py").read_text()

DEFAULTS = {
    # system parameters and model
    "DEPTH": 8,
    "ASPECT_RATIO": 64,
    "HEAD_DIM": 128,
    "WINDOW_PATTERN": "SSSL",
    "SHORT_WINDOW": 0.5,
    "MLP_RATIO": 4,
    "ROPE_THETA": 10_000,
    "LOGIT_SOFTCAP": 15.0,
    "VE_GATE_CHANNELS": 32,
    "VE_GATE_RANGE": 2.0,
    # weight initialisation
    "EMBED_INIT_STD": 1.0,
    "LM_HEAD_INIT_STD": 0.001,
    "MATRIX_INIT_SCALE": 1.0,
    "FC_INIT_SCALE": 1.0,
    "PROJ_INIT_STD": 0.0,
    "RESID_LAMBDA_INIT": 1.0,
    "X0_LAMBDA_INIT": 0.1,
    # parameter groups
    "MATRIX_LR": 0.04,
    "EMBEDDING_LR": 0.6,
    "UNEMBEDDING_LR": 0.004,
    "SCALAR_LR": 0.5,
    # AdamW and Muon
    "ADAM_BETA1": 0.8,
    "ADAM_BETA2": 0.95,
    "ADAM_EPS": 1e-10,
    "X0_BETA1": 0.96,
    "WEIGHT_DECAY": 0.2,
    "NS_STEPS": 5,
    "MUON_MOMENTUM": 0.95,
    "MUON_MOMENTUM_START": 0.85,
    "MUON_MOMENTUM_WARMUP_STEPS": 300,
    "MUON_BETA2": 0.95,
    "MUON_NORM_FACTOR": 1.02,
    # schedule and guards
    "WARMUP_RATIO": 0.0,
    "WARMDOWN_RATIO": 0.5,
    "FINAL_LR_FRAC": 0.0,
    "MAX_LOSS": 100,
    "GC_EVERY_STEPS": 5000,
    # batch
    "TOTAL_BATCH_SIZE": 2**19,
    "DEVICE_BATCH_SIZE": 128,
}


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items())
def test_the_default_is_the_references(name: str, value: object) -> None:
    found = pyedit.constants(TORCH)[name].value
    assert found == value
    assert type(found) is type(value)


def test_no_numeric_constant_is_without_a_reference() -> None:
    assert set(pyedit.constants(TORCH)) - set(DEFAULTS) == {"QK_SCALE"}  # 1.0, off: an idea the reference's agent found


def test_the_pinned_numbers_are_the_references() -> None:
    assert (VAL_SHARD, MAX_SHARD, STARTUP_EXCLUDE_STEPS) == (6542, 6542, 1)
    assert PROFILES["h100"].vocab_size == 8192


def test_the_default_model_has_the_samples_size() -> None:
    width, layers, vocab = 8 * 64, 8, 8192
    heads = width // 128
    embeddings = vocab * width * (1 + 1 + layers // 2)  # tokens, unembedding, value embeddings in every other layer
    blocks = layers * 12 * width * width + layers // 2 * heads * 32
    total = embeddings + blocks + 2 * layers
    assert f"{total / 1e6:.1f}" == "50.3"


def test_polar_express_brings_singular_values_to_one() -> None:
    """The coefficients, applied to one singular value at a time: 1e-3 to 1 all end within 0.7 to 1.2."""
    import ast

    tree = pyedit.parse(TORCH)
    [value] = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "POLAR_EXPRESS"
    ]
    coefficients = ast.literal_eval(value)
    assert len(coefficients) == 5
    for exponent in range(0, 31):
        x = 10 ** (-exponent / 10) / 1.02
        for a, b, c in coefficients:
            x = a * x + b * x**3 + c * x**5
        assert 0.7 < x < 1.2, exponent
