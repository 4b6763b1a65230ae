"""The model: its axes table, its Megatron build, and its Hugging Face form."""
