"""The formulas: parameters, bytes and operations of fine-tuning, as functions of shapes alone.

Nothing here imports JAX, so the same numbers can be had on a machine without it. Sizes are counts
of numbers, memory is in bytes, 1 GB is 10^9 bytes and 1 GiB is 2^30.

Reference:
    Hu et al., LoRA (arXiv:2106.09685), sections 4.1 and 4.2; Dettmers et al., QLoRA
    (arXiv:2305.14314), section 3; Kaplan et al. (arXiv:2001.08361), section 2.1: 2 N operations
    for a token forward, twice that backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

# Numbers that an optimizer keeps for each number that it trains; a matrix that is adafactor's
# keeps a row and a column of them, which rounds to none.
MOST_LOGITS = 2**24  # in memory together, where nothing else is asked for
MOMENTS = {
    "adamw": 2, "adam": 2, "lamb": 2, "radam": 2, "adopt": 2, "muon": 1, "lion": 1, "rmsprop": 1,
    "adagrad": 1, "momentum": 1, "sgd": 0, "adafactor": 0,
}  # fmt: skip
FACTOR_BYTES = 4  # factors, their gradients and moments are float32 whatever the base is
AT_ONCE = 0.75  # of a layer that is computed again: its first arrays are freed before its last
NF4_BLOCK = 64  # weights that share a scale
NF4_SCALES = 256  # scales that share a scale of theirs


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """One kernel, or a stack of them: one for every layer, say.

    Args:
      path: Its path in the parameters.
      inputs: Inputs of one kernel.
      outputs: Outputs of one kernel.
      count: How many there are in the stack.
      active: Numbers of the stack that one token meets: all of them, or with experts a share.
      kind: `"dense"`, or `"embedding"` for a table that is looked up.
      is_head: Whether its product is the logits.
    """

    path: str
    inputs: int
    outputs: int
    count: int
    active: int
    kind: str = "dense"
    is_head: bool = False

    @property
    def size(self) -> int:
        """Count the numbers of the stack."""
        return self.count * self.inputs * self.outputs

    def pair_size(self, rank: int) -> int:
        """Count the numbers of the stack's factors."""
        return self.count * pair_size(self.inputs, self.outputs, rank)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """What the formulas need to know of a Transformer.

    Args:
      name: What it is called.
      kernels: Its kernels and tables.
      other: Numbers that are in none of them: biases, norms.
      width: Channels of the hidden states.
      layers: Layers.
      heads: Heads that ask.
      groups: Heads that hold keys and values.
      head_dim: Channels of a head.
      feed_forward: Width of the feed-forward part that one token meets.
      vocabulary: Tokens that there are.
      wide_norms: Copies of the hidden states that a layer's norms keep in float32.
    """

    name: str
    kernels: tuple[KernelShape, ...]
    other: int
    width: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    wide_norms: int = 4

    @property
    def size(self) -> int:
        """Count all parameters."""
        return self.other + sum(kernel.size for kernel in self.kernels)

    @property
    def body(self) -> tuple[KernelShape, ...]:
        """The dense kernels but the output head: those that every token goes through."""
        return tuple(k for k in self.kernels if k.kind == "dense" and not k.is_head)


@dataclasses.dataclass(frozen=True)
class Work:
    """One training step.

    Args:
      rows: Rows that are in memory together.
      length: Tokens of a row.
      learned: Tokens of a row that have a loss, and so logits.
      parts: Parts of a batch, one after the other.
      remat: Whether each layer's activations are computed again in the backward pass.
      loss_chunk: Learned tokens whose logits are formed together; None: as many as MOST_LOGITS
        allows, 0: all.
    """

    rows: int
    length: int
    learned: int
    parts: int = 1
    remat: bool = False
    loss_chunk: int | None = None

    @property
    def tokens(self) -> int:
        """Count the tokens that are in memory together."""
        return self.rows * self.length


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a traced program keeps for the backward pass, in bytes for each token.

    Args:
      fixed: Whatever the row's length.
      by_length: For each token of the row: scores.
      remat_fixed: The same where layers are computed again, but for the one that is.
      remat_by_length: See `by_length`.
    """

    fixed: float
    by_length: float
    remat_fixed: float
    remat_by_length: float


# -----------------------------------------------------------------------------------------------
# Parameters
# -----------------------------------------------------------------------------------------------


def pair_size(inputs: int, outputs: int, rank: int) -> int:
    """Count the numbers of A (inputs, rank) and B (rank, outputs).

    Example:
      >>> pair_size(4096, 4096, 8), 4096 * 4096
      (65536, 16777216)
    """
    return rank * (inputs + outputs)


def fewer(inputs: int, outputs: int, rank: int) -> float:
    """Share of a kernel's numbers that its factors spare.

    Example:
      >>> f"{fewer(4096, 4096, 8):.2%}"
      '99.61%'
    """
    return 1 - pair_size(inputs, outputs, rank) / (inputs * outputs)


def adapter_size(kernels: Iterable[KernelShape], rank: int) -> int:
    """Count the numbers of the factors of several kernels."""
    return sum(kernel.pair_size(rank) for kernel in kernels)


# -----------------------------------------------------------------------------------------------
# Bytes that stay
# -----------------------------------------------------------------------------------------------


def weight_bytes(shape: ModelShape, number: int, quantize: str = "none") -> float:
    """Size of the base.

    Args:
      shape: The model.
      number: Bytes of a number that is not quantized.
      quantize: `"int8"` or `"nf4"` for the dense kernels but the head; `"none"`.

    Returns:
      Bytes.
    """
    per_kernel = {"none": None, "int8": int8_bytes, "nf4": nf4_bytes}[quantize]
    if per_kernel is None:
        return shape.size * number
    packed = sum(per_kernel(k.inputs, k.outputs) * k.count for k in shape.body)
    return packed + (shape.size - sum(k.size for k in shape.body)) * number


def int8_bytes(inputs: int, outputs: int) -> float:
    """A byte for each weight, and a float32 scale for each output.

    Example:
      >>> int8_bytes(4096, 4096) / 4096**2
      1.0009765625
    """
    return inputs * outputs + 4 * outputs


def nf4_bytes(inputs: int, outputs: int) -> float:
    """Four bits for each weight, a byte for each block's scale, and a scale of those scales.

    Example:
      >>> f"{8 * nf4_bytes(4096, 4096) / 4096**2:.3f} bits a weight"
      '4.127 bits a weight'

    Reference:
      Dettmers et al., QLoRA (arXiv:2305.14314), section 3, double quantization: 0.127 bits.
    """
    weights = inputs * outputs
    blocks = weights / NF4_BLOCK
    return weights / 2 + blocks + 4 * blocks / NF4_SCALES


def moment_bytes(trained: int, number: int, optimizer: str = "adamw") -> int:
    """Size of the optimizer's state.

    Args:
      trained: Numbers that are trained.
      number: Bytes of each.
      optimizer: Its name; one that is not known counts as AdamW.

    Returns:
      Bytes.
    """
    return MOMENTS.get(optimizer, MOMENTS["adamw"]) * trained * number


# -----------------------------------------------------------------------------------------------
# Bytes of a step
# -----------------------------------------------------------------------------------------------


def layer_bytes(shape: ModelShape, work: Work, number: int, rank: int = 0, pairs: int = 0) -> int:
    """What one layer keeps of the forward pass for the backward pass.

    For each token: the hidden states, before and behind the norms; queries, keys, values; scores
    before and behind the softmax, once in float32; six arrays of the feed-forward part's width;
    and the thin products of the adapter. This is read off what JAX keeps of the models here.

    Args:
      shape: The model.
      work: The step.
      number: Bytes of a number of the activations.
      rank: Rank of the factors; 0 in full fine-tuning.
      pairs: Kernels of a layer that have factors.

    Returns:
      Bytes.
    """
    attended = shape.heads * shape.head_dim
    hidden = shape.wide_norms * shape.width * 4 + (8 - shape.wide_norms) * shape.width * number
    attention = (2 * attended + 2 * shape.groups * shape.head_dim) * number
    scores = shape.heads * work.length * (4 + number)
    inner = 6 * shape.feed_forward * number
    return work.tokens * (hidden + attention + scores + inner + rank * pairs * number)


def activation_bytes(
    shape: ModelShape,
    work: Work,
    number: int,
    rank: int = 0,
    pairs: int = 0,
    kept: Kept | None = None,
) -> float:
    """What all layers keep; with `remat` their inputs, and most of one layer at a time.

    Args:
      shape: The model.
      work: The step.
      number: Bytes of a number of the activations.
      rank: Rank of the factors; 0 in full fine-tuning.
      pairs: Kernels of a layer that have factors.
      kept: What a trace of the model says, in place of `layer_bytes`.

    Returns:
      Bytes.
    """
    if kept is None:
        everything = shape.layers * layer_bytes(shape, work, number, rank, pairs)
        inputs = shape.layers * work.tokens * shape.width * number
    else:
        everything = work.tokens * (kept.fixed + kept.by_length * work.length)
        inputs = work.tokens * (kept.remat_fixed + kept.remat_by_length * work.length)
    return inputs + AT_ONCE * everything / shape.layers if work.remat else everything


def logit_bytes(shape: ModelShape, work: Work) -> int:
    """The learned tokens' logits and their gradient, in float32."""
    tokens = work.rows * work.learned
    chunk = work.loss_chunk
    chunk = max(1, MOST_LOGITS // shape.vocabulary) if chunk is None else chunk or tokens
    formed = min(chunk, tokens)
    return 2 * formed * shape.vocabulary * 4


# -----------------------------------------------------------------------------------------------
# Operations
# -----------------------------------------------------------------------------------------------


def forward_flops(shape: ModelShape, work: Work) -> int:
    """A pass through the layers: 2 for each weight and token, and attention; no head.

    Every query meets every key of its row, as masked scores are computed too.
    """
    products = 2 * work.tokens * sum(kernel.active for kernel in shape.body)
    return products + attention_flops(shape, work)


def attention_flops(shape: ModelShape, work: Work) -> int:
    """Scores, and the values weighted by them: two products."""
    return 4 * work.tokens * work.length * shape.heads * shape.head_dim * shape.layers


def head_flops(shape: ModelShape, work: Work) -> int:
    """Logits of the learned tokens."""
    return 2 * work.rows * work.learned * shape.width * shape.vocabulary


def full_flops(shape: ModelShape, work: Work) -> int:
    """A step of full fine-tuning: forward, and twice that backward (6 N T and attention)."""
    forward = forward_flops(shape, work)
    return work.parts * (3 * (forward + head_flops(shape, work)) + work.remat * forward)


def lora_flops(
    shape: ModelShape, work: Work, rank: int, adapted: Iterable[KernelShape] | None = None
) -> int:
    """A step of LoRA: no product for the gradient of a base weight, and three thin pairs.

    Args:
      shape: The model.
      work: The step.
      rank: Rank of the factors.
      adapted: The kernels that have them; None: all but the head.

    Returns:
      Floating-point operations.
    """
    adapted = shape.body if adapted is None else tuple(adapted)
    forward, head = forward_flops(shape, work), head_flops(shape, work)
    spared = forward - attention_flops(shape, work) + head  # the dW of full fine-tuning
    thin = 2 * work.tokens * sum(_active_pair(kernel, rank) for kernel in adapted)
    step = 3 * (forward + head) - spared + 3 * thin + work.remat * (forward + thin)
    return round(work.parts * step)


def _active_pair(kernel: KernelShape, rank: int) -> float:
    return kernel.pair_size(rank) * kernel.active / kernel.size
