"""transformers holds the weights of all experts of a layer in one tensor; its files, and we, one by one."""

from collections.abc import Mapping

from torch import Tensor


def per_expert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors (or their gradients) as its files name them; views of the model's own."""
    out = {}
    for name, tensor in state.items():
        if ".experts." not in name:
            out[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            one = name.replace(".experts.", f".experts.{expert}.")
            if one.endswith("gate_up_proj"):
                gate, up = weight.chunk(2)
                out[one.replace("gate_up_proj", "gate_proj.weight")] = gate
                out[one.replace("gate_up_proj", "up_proj.weight")] = up
            else:
                out[one + ".weight"] = weight
    return out
