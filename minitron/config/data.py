"""Where the text comes from and how it is cut into token sequences."""

from dataclasses import dataclass, field
from enum import StrEnum

from minitron.errors import ConfigError


class DataSource(StrEnum):
    """Kinds of text source (member names equal their values: OmegaConf reads the names)."""

    files = "files"
    local_text = "local_text"


@dataclass(kw_only=True)
class DataConfig:
    """Text source, held-out split and sequence length.

    Raises:
        ConfigError: a value is out of range, or ``paths`` does not go with ``source``.
    """

    source: DataSource = DataSource.local_text
    """``files``: the files and folders in ``paths``. ``local_text``: READMEs and Python sources of
    the packages installed in the running environment (needs no download)."""

    paths: list[str] = field(default_factory=list)
    """Files (.txt, .jsonl, .jsonl.gz, .parquet) or folders of them, read in the order given; a
    folder is read recursively, sorted by path. Only for ``source=files``."""

    text_key: str = "text"
    """Key (.jsonl) or column (.parquet) which holds the text."""

    parse_special_tokens: bool = False
    """Whether markers such as ``<|im_start|>`` written out in the text become special tokens. Set
    it for text that a chat template was applied to; otherwise they are ordinary characters."""

    seq_length: int = 1024
    """Length of a training sequence, in tokens."""

    heldout_fraction: float = 0.05
    """Share of the documents kept out of training, chosen by the hash of each document's text."""

    max_bytes: int | None = None
    """Stop reading with the document that reaches this many bytes of UTF-8 text; null reads all."""

    num_workers: int = 2
    """Tokenizing processes; 1 tokenizes in the calling process."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.source is DataSource.files and not self.paths:
            raise ConfigError(
                "data.source=files but data.paths is empty: name at least one file or folder, "
                "or use data.source=local_text"
            )
        if self.source is DataSource.local_text and self.paths:
            raise ConfigError(
                f"data.paths={list(self.paths)} but data.source=local_text reads no paths: use "
                "data.source=files, or leave data.paths empty"
            )
        if not self.text_key:
            raise ConfigError("data.text_key is empty: name the key that holds the text")
        if not 0.0 < self.heldout_fraction < 1.0:
            raise ConfigError(
                f"data.heldout_fraction={self.heldout_fraction} must lie strictly between 0 and 1: for example 0.05"
            )
        for name, value, least in (
            ("seq_length", self.seq_length, 2),
            ("num_workers", self.num_workers, 1),
            ("max_bytes", self.max_bytes, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(
                    f"data.{name}={value} is too small: set it to {least} or more"
                    + (", or to null for no limit" if name == "max_bytes" else "")
                )
