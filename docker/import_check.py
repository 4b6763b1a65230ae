"""Fail the build of an image that could not run: ``import_check.py cpu|gpu``. Prints the versions in it."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

VENV = Path("/opt/venv")
BOTH = ("torch", "megatron.core", "transformers", "hydra", "minitron.cli.main", "minitron.cli.actions")
GPU = ("transformer_engine.pytorch", "apex", "fused_weight_gradient_mlp_cuda")


def main() -> int:
    """Import what a run imports.

    Returns:
        Exit code.
    """
    target = sys.argv[1]
    for name in BOTH if target == "cpu" else (*BOTH, *GPU):
        importlib.import_module(name)
    torch = sys.modules["torch"]
    torch.zeros(1).numpy()  # the lock's numpy fits a torch of the base's
    ours = VENV in Path(str(torch.__file__)).parents
    if ours != (target == "cpu"):
        print(f"import_check: torch {torch.__version__} is {torch.__file__}, which is not the {target} image's")
        return 1
    for package in ("minitron", "torch", "megatron-core", "transformer-engine"):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
