"""A run folder with numbers chosen by hand, at the real demo's shape."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.runtime.artefact import RunFolder, StageIdentity
from tests.helpers.smollm2 import SMOLLM2_135M

ENVIRONMENT = {"minitron": "0.1.0", "torch": "2.9.0", "machine": "Linux x86_64, a processor"}
PROMPT = "The capital of France is"
EVIL = " <script>alert('x')</script> & \x07Paris"

SOURCE = SMOLLM2_135M
DROPPED = [21, 22, 23, 24, 25, 26]
KEPT = [layer for layer in range(30) if layer not in DROPPED]
TARGET = replace(SOURCE, num_layers=24, hidden_size=448, ffn_hidden_size=1152, num_attention_heads=6)

# By hand: per layer 2 H (norms) + H (N + 2 G) D (qkv) + N D H (proj) + 3 F H (mlp); besides V H (tied) and H (norm).
SOURCE_LAYER = 2 * 576 + 576 * (9 + 6) * 64 + 9 * 64 * 576 + 3 * 1536 * 576
TARGET_LAYER = 2 * 448 + 448 * (6 + 6) * 64 + 6 * 64 * 448 + 3 * 1152 * 448
SOURCE_NON_EMBEDDING = 30 * SOURCE_LAYER + 576
TARGET_NON_EMBEDDING = 24 * TARGET_LAYER + 448
SOURCE_PARAMETERS = SOURCE_NON_EMBEDDING + 49152 * 576
TARGET_PARAMETERS = TARGET_NON_EMBEDDING + 49152 * 448

LOSSES = {"teacher": 3.0, "pruned": 8.0, "distilled": 4.0, "baseline": 6.5}  # (8 - 4) / (8 - 3) = 0.8
NUM_TOKENS = 819_200
EVAL_TOKENS = 16_384
SECONDS = {
    "import": 9.5,
    "data": 31.0,
    "eval_teacher": 42.0,
    "score": 75.0,
    "prune": 4.25,
    "verify": 3.5,
    "eval_pruned": 25.0,
    "distill": 5025.0,
    "eval_distilled": 25.5,
    "baseline": 3100.0,
    "eval_baseline": 25.25,
    "export": 8.0,
}


def make_run(folder: Path, *, without: tuple[str, ...] = (), sample: str = EVIL) -> Path:
    """Write the whole run but the stages named in ``without``."""
    for stage in SECONDS:
        if stage in without:
            continue
        identity = StageIdentity(stage, _values(stage), {})
        run = RunFolder(folder)
        _fill(stage, run.begin(identity, resumable=False), sample)
        run.finish(identity, summary=_summary(stage), seconds=SECONDS[stage], environment=ENVIRONMENT)
    return folder


def as_run(folder: Path) -> RunFolder:
    """The run as its report reads it: what was pruned is what was imported."""
    return RunFolder(folder, lambda stage: "import" if stage == "source" else stage)


def importance() -> dict[str, NDArray[np.float64]]:
    """Scores whose best layers and channels are the kept ones."""
    rng = np.random.default_rng(0)
    layer = 0.08 + 0.1 * rng.random(30)
    layer[DROPPED] = 0.02 + 0.05 * rng.random(6)
    layer[0] = 0.75
    hidden = np.sort(rng.lognormal(1.0, 0.8, 576))[::-1].copy()
    hidden[3] = 300.0
    ffn = rng.lognormal(np.linspace(-2, 1, 30)[:, None], 0.7, (30, 1536))
    return {"layer": layer, "hidden": hidden, "ffn": ffn, "head": rng.random((30, 9)) + 0.1}


def rewrite_meta(folder: Path, **changes: Any) -> None:
    """Change entries of a stage's meta.json."""
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _values(stage: str) -> dict[str, Any]:
    if stage in ("distill", "baseline"):
        return {"distill.train.num_tokens": NUM_TOKENS, "distill.train.lr": 5e-4}
    if stage == "prune":
        return {"prune.ranking": "importance", "prune.aggregation": "l2_mean"}
    return {}


def _summary(stage: str) -> dict[str, Any]:
    return {
        "import": {"source": "gguf", "name": "SmolLM2-135M-Instruct"},
        "distill": {"teacher_parameters": SOURCE_PARAMETERS},
        "prune": {"score_kept_layers": 0.9731, "score_kept_ffn": 0.88, "layers": "30 -> 24"},
        "verify": {"sequences": 2, "tokens": 128, "masked_teacher_error": 3.1e-6},
        "export": {"max_logit_error": 2.5e-5, "size_bytes": 3_000},
    }.get(stage, {})


def _fill(stage: str, folder: Path, sample: str) -> None:
    kind, _, role = stage.partition("_")
    if stage in ("import", "prune", "distill", "baseline"):
        shape = SOURCE if stage == "import" else TARGET
        (folder / "model.json").write_text(json.dumps(shape.to_dict()))
    if stage == "data":
        split = {"num_documents": 900, "num_tokens": 3_276_800, "num_bytes": 12_000_000}
        about = {"eos_id": 0, "vocab_size": 49152, "dtype": "uint16"}
        hashes = {"tokenizer_sha256": "a", "source_fingerprint": "b", "train_sha256": "c", "heldout_fraction": 0.05}
        (folder / "data.json").write_text(json.dumps({"train": split, "heldout": split, **about, **hashes}))
    elif kind == "eval":
        loss = LOSSES[role]
        result = {"loss": loss, "perplexity": float(np.exp(loss)), "num_tokens": EVAL_TOKENS, "prompt": PROMPT}
        (folder / "eval.json").write_text(json.dumps({**result, "sample": sample}))
    elif stage == "prune":
        (folder / "prune_spec.json").write_text(json.dumps(_spec()))
    elif stage in ("distill", "baseline"):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in _records(stage)))
    elif stage == "export":
        (folder / "hf").mkdir()
        (folder / "hf" / "model.safetensors").write_bytes(b"\0" * 3000)


def _spec() -> dict[str, Any]:
    heads = ["0-1,3-4,6-7", "0,2-3,5-6,8"]
    return {
        "format": 1,
        "layers": "0-20,27-29",
        "hidden": "0-447",
        "ffn": ["0-1151"] * 24,
        "heads": [heads[i % 2] for i in range(24)],
        "groups": ["0-2"] * 24,
    }


def _records(stage: str) -> list[dict[str, float]]:
    start, end, term = (5.0, 1.0, "forward_kl") if stage == "distill" else (10.8, 6.4, "cross_entropy")
    heldout_start, heldout_end = (8.0, 4.03) if stage == "distill" else (10.8, 6.52)
    records = []
    for step in range(1, 401):
        decay = (np.exp(-step / 80) - np.exp(-5)) / (1 - np.exp(-5))
        noise = 0.1 * np.sin(step * 12.9898)
        loss = end + (start - end) * decay + noise
        record = {"step": step, "loss": loss, term: loss, "grad_norm": 1.0, "lr": 1e-4}
        if step % 50 == 0:
            record["heldout_loss"] = heldout_end + (heldout_start - heldout_end) * decay
        records.append({**record, "tokens": step * 2048, "tokens_per_s": 163.0 if stage == "distill" else 264.0})
    return records
