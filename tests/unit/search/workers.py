"""What the ranks of the latency benchmark's test run."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from minitron.compat.cpu import CPU_LAYER
from minitron.config.model import Architecture, ModelConfig
from minitron.config.parallel import ParallelConfig
from minitron.config.run import Device, RunConfig
from minitron.config.search import ServingConfig
from minitron.parallel.groups import model_parallel
from minitron.runtime.artefact import RunFolder
from minitron.runtime.session import Session
from minitron.search.measure import measure_widths

MODEL = ModelConfig(
    architecture=Architecture.llama,
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=2,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=34,
    max_position_embeddings=32,
    layernorm_epsilon=1e-6,
    rotary_base=10000.0,
)
WIDE = replace(MODEL, hidden_size=32, num_layers=2)


def measure(out: Path, parallel: ParallelConfig) -> int:
    """Three shapes of two widths, in the session of any layout."""
    CPU_LAYER.apply()
    try:
        with model_parallel(parallel, seed=1) as groups:
            session = Session(
                config=RunConfig(parallel=parallel),
                run=RunFolder(out),
                groups=groups,
                device=Device.cpu,
                console=Console(quiet=True),
            )
            shapes = [MODEL, replace(MODEL, num_layers=7), WIDE]
            return measure_widths(session, shapes, ServingConfig(batch_size=2, prompt_tokens=8, new_tokens=2), out)
    finally:
        CPU_LAYER.undo()
