"""Updates: what an adapter may do to one leaf. Each says how it is applied, merged and checked."""

from jax_lora.updates.pair import LoraPair
from jax_lora.updates.token_rows import TokenRows
from jax_lora.updates.update import Update
from jax_lora.updates.whole_leaf import WholeLeaf

KINDS = (LoraPair, TokenRows, WholeLeaf)  # for `isinstance`: checking a protocol runs properties

__all__ = ("KINDS", "LoraPair", "TokenRows", "Update", "WholeLeaf")
