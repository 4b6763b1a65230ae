"""A tiny Llama with random weights and a byte tokenizer, as a Hugging Face folder: for tests and dry runs."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from minitron.config.run import RandomModelConfig

END_OF_TEXT = "<|endoftext|>"


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
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=config.num_layers,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_query_groups,
            head_dim=config.hidden_size // config.num_attention_heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    torch.set_rng_state(generator_state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, END_OF_TEXT])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
