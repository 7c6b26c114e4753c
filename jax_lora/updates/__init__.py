"""Updates: the kinds of adapter weights of one leaf, with a common interface."""

from jax_lora.updates.pair import LoraPair
from jax_lora.updates.token_rows import TokenRows
from jax_lora.updates.update import Update
from jax_lora.updates.whole_leaf import WholeLeaf

KINDS = (LoraPair, TokenRows, WholeLeaf)  # for `isinstance`, which is slow on the protocol

__all__ = ("KINDS", "LoraPair", "TokenRows", "Update", "WholeLeaf")
