"""The order of stages, and what it takes to run one exactly once."""

from minitron.pipeline.stage import (
    OutsideHashes,
    Planned,
    Stage,
    nothing_outside,
    outside_hashes,
    plan_stages,
    run_stages,
)

__all__ = ["OutsideHashes", "Planned", "Stage", "nothing_outside", "outside_hashes", "plan_stages", "run_stages"]
