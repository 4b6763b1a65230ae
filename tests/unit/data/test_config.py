from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import ValidationError

from minitron.config.data import DataConfig, DataSource
from minitron.errors import ConfigError


def test_structured_round_trip() -> None:
    node = OmegaConf.merge(OmegaConf.structured(DataConfig), {"source": "files", "paths": ["a.txt"], "seq_length": 8})
    cfg = OmegaConf.to_object(node)
    assert cfg == DataConfig(source=DataSource.files, paths=["a.txt"], seq_length=8)
    with pytest.raises(ValidationError, match="seq_length"):
        OmegaConf.merge(OmegaConf.structured(DataConfig), {"seq_length": "long"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": DataSource.files}, r"data.source=files but data.paths is empty: name at least"),
        ({"paths": ["a.txt"]}, r"data.paths=\['a.txt'\] but data.source=local_text reads no paths"),
        ({"heldout_fraction": 0.0}, r"heldout_fraction=0.0 must lie strictly between 0 and 1"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction=1.0 must lie strictly between 0 and 1"),
        ({"seq_length": 1}, r"data.seq_length=1 is too small: set it to 2 or more$"),
        ({"num_workers": 0}, r"data.num_workers=0 is too small: set it to 1 or more$"),
        ({"max_bytes": 0}, r"data.max_bytes=0 is too small: set it to 1 or more, or to null"),
        ({"text_key": ""}, r"data.text_key is empty"),
    ],
)
def test_nonsense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        DataConfig(**values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["local_text", "files"])
def test_yaml_fits_the_schema(name: str) -> None:
    path = Path(__file__).parents[3] / "conf" / "data" / f"{name}.yaml"
    values = OmegaConf.load(path)
    assert values.pop("defaults") == ["schema", "_self_"]
    assert set(values) <= {field.name for field in fields(DataConfig)}
    if name == "files":
        values.paths = ["corpus"]
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), values))
    assert isinstance(cfg, DataConfig)
    assert cfg.source is DataSource(name)
