"""Examples for the API's description; a test sends the requests among them."""

from __future__ import annotations

from typing import Any

from shared.wire import PROTOCOL

_ID = "0c7f5a3e-6a0b-4c53-9a55-1c4f6f2f8d11"
_IDEA = "7d9f1a52-0c3e-4a7e-8f0e-0f6f7a1f9b21"
_T = "1f0b7c3d5e8a9246b0d1c2e3f405162738495a6b"
_P = "2e1a8d4c6f9b0357a1c2d3e4f516273849506b7c"
_K = "3d2b9e5dafac1468b2d3e4f5061728394a5b6c7d"

REGISTRATION: dict[str, Any] = {
    "protocol": PROTOCOL,
    "version": "0.1.0",
    "uid": "5b0e2f64-3f4b-4a0e-9d55-2f1f5d6a7c88",
    "name": "studio",
    "machine_class": "mlx-m4max",
    "backend": "mlx",
    "hardware": {"host": "studio", "os": "Darwin 25.1", "chip": "Apple M4 Max", "cores": 16, "memory_gb": 64.0},
    "can": ["explore", "confirm"],
}

HEARTBEAT: dict[str, Any] = {
    "activity": {
        "state": "running",
        "experiment": _ID,
        "number": 12,
        "description": "set MATRIX_LR to 0.03",
        "seconds": 41.5,
        "step": 180,
        "share": 0.14,
        "loss": 3.21,
        "outbox": 0,
    },
    "leases": [],
}

REPORT: dict[str, Any] = {
    "version": 4,
    "number": 12,
    "kind": "explore",
    "idea": _IDEA,
    "fingerprint": "1:9f2c",
    "profile": "apple",
    "tested": _T,
    "parent": _P,
    "kept": _K,
    "description": "set MATRIX_LR to 0.03",
    "proposer": "search",
    "edits": {"MATRIX_LR": 0.03},
    "params": {"MATRIX_LR": 0.03, "DEPTH": 4},
    "nodes_added": 0,
    "code_state": "ab" * 32,
    "status": "keep",
    "reason": "0.012000 better (+2.4 sigma)",
    "decided_at": 1790000000,
    "runs": [
        {
            "id": "9a3d4b5c-1e2f-4a6b-8c7d-0e1f2a3b4c5d",
            "seed": 1234,
            "score": 1.2857,
            "memory_gb": 18.4,
            "seconds": 371.0,
            "phases": {"start": 12.1, "train": 300.0, "evaluate": 58.0},
            "metrics": {"num_steps": 1288.0},
        }
    ],
    "diff": "--- a/train.py\n+++ b/train.py\n@@ -1 +1 @@\n-MATRIX_LR = 0.04\n+MATRIX_LR = 0.03\n",
    "log_tail": "",
}

LEADERBOARD: dict[str, Any] = {
    "campaign": "nanochat",
    "metric": "val_bpb",
    "direction": "minimize",
    "order": "group",
    "next": None,
    "standings": [
        {
            "rank": 1,
            "machine": "studio",
            "machine_class": "mlx-m4max",
            "profile": "apple",
            "rung": "base",
            "best": 1.2857,
            "baseline": 1.4012,
            "gain": 0.1155,
            "sigma": 0.0048,
            "gain_sigmas": 24.1,
            "runs": 1,
            "confirmed": False,
            "suspects": 0,
            "experiments": 12,
            "keeps": 4,
            "lineage": 4,
            "commit": _K,
            "experiment": _ID,
            "description": "set MATRIX_LR to 0.03",
        }
    ],
}

EXPERIMENT: dict[str, Any] = {
    **{key: REPORT[key] for key in ("number", "kind", "idea", "profile", "status", "tested", "parent", "kept")},
    **{key: REPORT[key] for key in ("description", "proposer", "reason", "decided_at", "edits", "params")},
    **{key: REPORT[key] for key in ("nodes_added", "code_state", "fingerprint")},
    "id": _ID,
    "machine": "studio",
    "machine_class": "mlx-m4max",
    "rung": "base",
    "score": 1.2857,
    "mean": 1.2857,
    "runs": 1,
    "memory_gb": 18.4,
    "seconds": 371.0,
    "confirmed": False,
    "suspect": False,
    "position": 40,
    "digest": "f3" * 32,
    "log_tail": "",
    "has_diff": True,
    "run_reports": REPORT["runs"],
}
