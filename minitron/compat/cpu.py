"""The CPU device layer: the one place that makes Megatron-Core run without CUDA.

Megatron-Core has no CPU mode: it asks ``torch.cuda`` for the current device, for streams and for random states, and
passes ``device="cuda"`` to tensor factories. Each entry of `redirects` answers one of those questions with the CPU,
and says why. The layer is applied once per process by `minitron.runtime.device`, can be listed
(`describe`) and undone, and refuses to be applied where CUDA is available.
"""

import contextlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

from minitron.compat.layer_norm import layer_norm_1p
from minitron.errors import PlatformError


class NullStream:
    """Stands for a CUDA stream: on a CPU every operation is already ordered."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def wait_stream(self, _other: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, _event: object) -> None:
        """Nothing to wait for."""

    def record_event(self, event: object = None) -> object:
        """Nothing to record."""
        return event

    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaToCpu(TorchFunctionMode):
    """Sends tensors that are asked for on CUDA to the CPU.

    Megatron's optimizer also recognises parameters by ``Tensor.type()``, which it compares with the
    ``torch.cuda.*Tensor`` names; the mode answers with the name that the same tensor would have there.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Rewrite ``device=``, ``pin_memory=`` and the answer of ``Tensor.type()``; pass everything else through."""
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if isinstance(device, int) or (device is not None and str(device).startswith("cuda")):
            kwargs["device"] = torch.device("cpu")
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


@dataclass(frozen=True)
class Redirect:
    """One replaced attribute of a module or class: where it is, what replaces it, and why."""

    owner: str
    attribute: str
    replacement: Any
    reason: str

    @property
    def target(self) -> str:
        """Dotted name of what is replaced."""
        return f"{self.owner}.{self.attribute}"


def _cpu_rng_state(*_args: object, **_kwargs: object) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(new_state: torch.Tensor, *_args: object, **_kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _same_tensor(tensor: torch.Tensor, *_args: object, **_kwargs: object) -> torch.Tensor:
    return tensor


def _norm(config: Any, hidden_size: int, eps: float = 1e-5, **_kwargs: object) -> torch.nn.Module:
    """Build Megatron's norm on the CPU.

    Under sequence parallelism each tensor-parallel rank sees a part of the tokens: the mark makes Megatron sum the
    parts of the weight's gradient, as it does for Transformer Engine's norms.
    """
    norm: torch.nn.Module
    if config.normalization == "RMSNorm":
        assert not config.layernorm_zero_centered_gamma
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
    else:
        norm = layer_norm_1p(config, hidden_size, eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm


def _core_attention(_provider: object) -> type:
    from minitron.compat.cpu_attention import ContextParallelAttention  # needs Megatron, which the launcher does not

    return ContextParallelAttention


def _many_tensors() -> tuple[tuple[str, str, Any], ...]:
    """(module, name, Megatron's own) of the functions on lists of tensors that its optimizer calls."""
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )

    return (
        ("optimizer", "multi_tensor_applier", local_multi_tensor_applier),
        ("optimizer", "multi_tensor_scale_impl", local_multi_tensor_scale),
        ("clip_grads", "multi_tensor_applier", local_multi_tensor_applier),
        ("clip_grads", "l2_norm_impl", local_multi_tensor_l2_norm),
        ("clip_grads", "multi_tensor_scale_impl", local_multi_tensor_scale),
        ("clip_grads", "multi_tensor_scale_tensor_impl", None),
    )


def redirects() -> tuple[Redirect, ...]:
    """Everything the layer replaces (besides the tensor factories, see `CudaToCpu`)."""
    stream = NullStream()
    rng = "megatron.core.tensor_parallel.random"
    local = "megatron.core.models.backends.LocalSpecProvider"
    block = "megatron.core.transformer.transformer_block"
    router = "megatron.core.transformer.moe.router.TopKRouter"
    adam = "megatron.core.optimizer"
    kernels = "of Transformer Engine or Apex where one is installed: CUDA only"
    return (
        Redirect("torch.cuda", "current_device", lambda: torch.device("cpu"), "device of buffers"),
        Redirect("torch.cuda", "synchronize", lambda *_a, **_k: None, "called around pipeline sends"),
        Redirect("torch.cuda", "Stream", NullStream, "side streams of gradient reduction"),
        Redirect("torch.cuda", "current_stream", lambda *_a: stream, "waits of gradient reduction"),
        Redirect("torch.cuda", "default_stream", lambda *_a: stream, "waits of gradient reduction"),
        Redirect("torch.cuda", "stream", lambda _s: contextlib.nullcontext(), "side streams"),
        Redirect("torch.cuda", "manual_seed", torch.manual_seed, "seeding of the RNG tracker"),
        Redirect("torch.cuda", "get_rng_state", _cpu_rng_state, "states of the RNG tracker"),
        Redirect("torch.cuda", "set_rng_state", _set_cpu_rng_state, "states of the RNG tracker"),
        Redirect(rng, "_get_cuda_rng_state", _cpu_rng_state, "states of the RNG tracker"),
        Redirect(rng, "_set_cuda_rng_state", _set_cpu_rng_state, "states of the RNG tracker"),
        Redirect("torch.Tensor", "cuda", _same_tensor, "copies of small host tensors"),
        Redirect(local, "layer_norm", lambda *_a, **_k: _norm, "the local norm refuses sequence parallelism"),
        Redirect(local, "core_attention", _core_attention, "the local attention refuses context parallelism"),
        Redirect(router, "_apply_expert_bias", lambda *_a, **_k: None, "compiled; no model of ours has that bias"),
        Redirect(block, "LayerNormImpl", _norm, "the final norm: the same, and may be Transformer Engine's"),
        Redirect(adam, "USING_PYTORCH_OPTIMIZER", True, f"Adam {kernels}"),
        Redirect(f"{adam}.distrib_optimizer", "HAVE_APEX_OR_TE", False, f"Adam {kernels}"),
        Redirect(f"{adam}.distrib_optimizer", "USING_TE_OPTIMIZER", False, f"Adam {kernels}"),
        Redirect(f"{adam}.distrib_optimizer", "USING_APEX_OPTIMIZER", False, f"Adam {kernels}"),
        *(
            Redirect(f"{adam}.{module}", name, replacement, f"products over many tensors {kernels}")
            for module, name, replacement in _many_tensors()
        ),
    )


_INHERITED = object()
"""Stands for an attribute that a class has from its base: undoing removes ours, and the base's shows again."""


class CpuLayer:
    """Applies the redirects, and undoes them."""

    def __init__(self) -> None:
        self._saved: list[tuple[object, str, Any]] = []
        self._mode: CudaToCpu | None = None

    @property
    def applied(self) -> bool:
        """Whether the layer is in force."""
        return self._mode is not None

    def apply(self) -> Self:
        """Put the layer in force.

        Raises:
            PlatformError: CUDA is available; tensors would silently land on the wrong device.
        """
        if self.applied:
            return self
        if torch.cuda.is_available():
            raise PlatformError(
                "the CPU device layer is refused where CUDA is available; set device=cuda, "
                "or hide the GPUs with CUDA_VISIBLE_DEVICES= to run on the CPU"
            )
        # All owners first: an import that fails must leave nothing redirected.
        for redirect, owner in [(redirect, pkgutil.resolve_name(redirect.owner)) for redirect in redirects()]:
            self._saved.append((owner, redirect.attribute, vars(owner).get(redirect.attribute, _INHERITED)))
            setattr(owner, redirect.attribute, redirect.replacement)
        self._mode = CudaToCpu()
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def undo(self) -> None:
        """Put everything back."""
        if self._mode is None:
            return
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._mode = None
        while self._saved:
            owner, attribute, original = self._saved.pop()
            if original is _INHERITED:
                delattr(owner, attribute)
            else:
                setattr(owner, attribute, original)

    @contextlib.contextmanager
    def in_force(self) -> Iterator[Self]:
        """The layer for the length of a block."""
        self.apply()
        try:
            yield self
        finally:
            self.undo()


CPU_LAYER = CpuLayer()
"""The layer of this process."""


def describe() -> list[str]:
    """One line per redirect, for logs and ``minitron --version``."""
    lines = [f"{redirect.target}: {redirect.reason}" for redirect in redirects()]
    return [*lines, 'tensor factories with device="cuda" or pinned memory: scratch tensors of schedules and optimizer']
