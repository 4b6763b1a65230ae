"""Names used everywhere: the axis letters behind tensor names, and the records passed between layers.

Axis letters (Megatron's order), used as suffixes of tensor names such as ``hidden_SBH``:

====== ==================== ====== =====================
letter meaning              letter meaning
====== ==================== ====== =====================
S      sequence position    N      query heads
B      micro-batch          G      query groups
H      hidden channels      D      channels of one head
F      ffn neurons          V      vocabulary
L      layers               T      tokens (S x B, flattened)
====== ==================== ====== =====================

A lower-case letter is this rank's shard of that axis: ``logits_SBv`` holds a slice of the vocabulary.
"""
