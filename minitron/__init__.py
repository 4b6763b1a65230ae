"""minitron: make large language models small by pruning and distillation.

Importing the package touches neither torch nor Megatron-Core; the verbs in `minitron.cli` do.
"""

__version__ = "0.1.0"
