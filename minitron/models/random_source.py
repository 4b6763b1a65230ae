"""A tiny model with random weights and a byte tokenizer, as a Hugging Face folder: for tests and dry runs."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minitron.config.model import ModelConfig
from minitron.config.run import RandomModelConfig
from minitron.errors import ModelError
from minitron.models.hf_config import to_hf_config

END_OF_TEXT = "<|endoftext|>"


def random_model(config: RandomModelConfig) -> ModelConfig:
    """Architecture of the model that `write_random_model` writes.

    Raises:
        ModelError: The heads do not divide the hidden size.
    """
    heads, channels = config.num_attention_heads, config.kv_channels
    if channels is None and (heads < 1 or config.hidden_size % heads):
        raise ModelError(
            f"source.random: hidden_size={config.hidden_size} is not a multiple of num_attention_heads={heads}; change "
            "one of the two, or give kv_channels"
        )
    return ModelConfig(
        architecture=config.architecture,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.hidden_size // heads if channels is None else channels,
        vocab_size=len(_symbols()),
        max_position_embeddings=config.max_position_embeddings,
        layernorm_epsilon=1e-6,
        rotary_base=10000.0,
        rotary_percent=config.rotary_percent,
        share_embeddings_and_output_weights=config.share_embeddings_and_output_weights,
    )


def write_random_model(config: RandomModelConfig, folder: Path) -> Path:
    """Write the folder; the same configuration gives the same weights.

    Args:
        config: Shape and seed.
        folder: Where; made if missing.

    Returns:
        The folder.
    """
    tokenizer = _byte_tokenizer()
    generator_state = torch.get_rng_state()
    torch.manual_seed(config.seed)
    special = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values = to_hf_config(random_model(config), special)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_token_ids() -> dict[str, int]:
    """The id of every token of its tokenizer: one token per byte, and an end-of-text token."""
    return {symbol: number for number, symbol in enumerate(_symbols())}


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=random_token_ids(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def _symbols() -> list[str]:
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), END_OF_TEXT]
