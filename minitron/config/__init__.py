"""Typed configuration: dataclasses registered with Hydra, checked when they are composed.

Imports neither torch nor Megatron-Core, so that composing and validating a run costs no GPU and little time.
"""
