"""Equal layers under one `nn.scan`: every parameter gets a leading axis of layers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jax_lora.models.rematerialization import remat_policy


def layer_stack(
    layer: type[nn.Module], length: int, *, remat: bool | str, inputs_per_layer: int = 0
) -> Any:
    """Stack a layer class; `remat` is one of `REMAT`, or a boolean.

    The layer is called as `layer(x, shared, *per_layer)` and returns `(x, output)`. `shared` goes
    to every layer unchanged; each per-layer input is stacked along its first axis, or None.

    Returns:
      A module class that is constructed like `layer`. It returns x after the last layer and the
      stacked outputs of all layers.
    """
    if isinstance(remat, bool):
        remat = "full" if remat else "none"
    if remat != "none":
        # Under scan, the loop itself keeps XLA from undoing the recomputation.
        layer = nn.remat(layer, prevent_cse=False, policy=remat_policy(remat))
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, *(0,) * inputs_per_layer),  # pyright: ignore[reportArgumentType]
        length=length,
    )
