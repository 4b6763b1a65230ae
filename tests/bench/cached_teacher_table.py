"""How far distilling from a cache lands from distilling with the teacher in memory: same data, student and seed.

    python -m tests.bench.cached_teacher_table [key=value ...]      # the demo's model and student; overrides are passed

One run folder; the student is distilled anew for every source. Printed for each: bytes per token of the cache, what
writing it and distilling took, the last held-out loss, and its distance to the online teacher's.
"""

import json
import subprocess
import sys
from pathlib import Path

SOURCES: dict[str, list[str]] = {
    "online": [],
    "sampled, 50 draws": ["teacher_logits.method=sampled"],
    "top_k, 48, ghost": ["teacher_logits.method=top_k"],
    "top_p, 0.95, ghost": ["teacher_logits.method=top_p"],
}


def minitron(verb: str, *overrides: str) -> None:
    experiment = [] if any(o.startswith("experiment=") for o in overrides) else ["experiment=demo"]
    command = [sys.executable, "-m", "minitron.cli.main", verb, *experiment, "on_change=rerun"]
    subprocess.run([*command, "name=bench-cached-teacher", *overrides], check=True)


def meta(run: Path, stage: str) -> dict[str, float]:
    values = json.loads((run / stage / "meta.json").read_text())
    return {**values["summary"], "seconds": values["seconds"]}


def main(overrides: list[str]) -> None:
    runs_dir = next((o.partition("=")[2] for o in overrides if o.startswith("runs_dir=")), "runs")
    run = Path(runs_dir) / "bench-cached-teacher"
    for stage in ("import", "data", "score", "prune"):
        minitron(stage, *overrides)
    rows = []
    for name, settings in SOURCES.items():
        cached = [*overrides, *settings, "distill.teacher.source=cached"] if settings else overrides
        cache = None
        if settings:
            minitron("teacher-logits", *cached)
            cache = meta(run, "teacher_logits")
        minitron("distill", *cached)
        rows.append((name, cache, meta(run, "distill")))
    online = rows[0][2]["heldout_loss"]
    sys.stdout.write("\nteacher              bytes/token  write, s  distill, s  held-out loss  distance\n")
    for name, cache, distilled in rows:
        loss = distilled["heldout_loss"]
        written = f"{cache['bytes_per_token']:>11.1f}  {cache['seconds']:>8.0f}" if cache else f"{'':>21}"
        sys.stdout.write(
            f"{name:<20} {written}  {distilled['seconds']:>10.0f}  {loss:>13.4f}  {loss - online:>+8.4f}\n"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
