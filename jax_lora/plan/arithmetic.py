"""Formulas for the parameters, memory and floating-point operations of fine-tuning a Transformer.

Every result depends on shapes only, and nothing here imports JAX. Sizes are numbers of elements,
memory is in bytes, 1 GB is 10^9 bytes and 1 GiB is 2^30 bytes.

Reference:
    Hu et al., LoRA (arXiv:2106.09685), sections 4.1 and 4.2; Dettmers et al., QLoRA
    (arXiv:2305.14314), section 3; Kaplan et al., Scaling Laws (arXiv:2001.08361), section 2.1:
    a forward pass costs 2 N operations per token, a backward pass twice that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

# Optimizer state per trainable parameter, in elements. Adafactor stores a row and a column for each
# matrix, which is negligible.
STATE_SIZE = {
    "adamw": 2, "adam": 2, "lamb": 2, "radam": 2, "adopt": 2, "muon": 1, "lion": 1, "rmsprop": 1,
    "adagrad": 1, "sgd": 0, "adafactor": 0,
}  # fmt: skip
MOST_LOGITS = 2**24  # logits computed at a time unless `loss_chunk` is set
ADAPTER_BYTES = 4  # per element: adapter weights are float32, whatever the dtype of the base
RECOMPUTED_SHARE = 0.75  # of a recomputed layer's activations that are live at the same time
NF4_BLOCK = 64  # weights per scale
NF4_SCALES = 256  # scales per second-level scale


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """A kernel, or a stack of kernels with the same shape (one per layer or expert)."""

    path: str  # in the parameters
    inputs: int  # features of one kernel
    outputs: int  # features of one kernel
    count: int  # kernels in the stack
    active: int  # elements of the stack that one token uses; fewer than `size` for experts
    kind: str = "dense"  # "dense" or "embedding"
    is_head: bool = False  # computes the logits
    is_router: bool = False  # routes tokens to experts

    @property
    def size(self) -> int:
        """Elements of the stack."""
        return self.count * self.inputs * self.outputs

    def pair_size(self, rank: int) -> int:
        """Count the elements of the stack's LoRA factors."""
        return self.count * pair_size(self.inputs, self.outputs, rank)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The sizes of a Transformer that the formulas use."""

    name: str
    kernels: tuple[KernelShape, ...]  # kernels and embedding tables
    other: int  # parameters outside `kernels`: biases and norms
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # features of a head
    intermediate_size: int  # features inside the feed-forward block, for one token
    vocab_size: int
    float32_norms: int = 4  # float32 copies of the hidden states that the norms of a layer keep

    @property
    def size(self) -> int:
        """All parameters."""
        return self.other + sum(kernel.size for kernel in self.kernels)

    @property
    def body(self) -> tuple[KernelShape, ...]:
        """Dense kernels except the output head."""
        return tuple(k for k in self.kernels if k.kind == "dense" and not k.is_head)

    @property
    def linear(self) -> tuple[KernelShape, ...]:
        """Dense kernels except the output head and routers, as in "all-linear"."""
        return tuple(k for k in self.body if not k.is_router)


@dataclasses.dataclass(frozen=True)
class Step:
    """The shape of one training step."""

    batch_size: int  # examples in memory at a time
    length: int  # sequence length
    targets: int  # target tokens per example: the tokens that have a loss
    accumulation: int = 1  # gradient accumulation steps
    remat: bool = False  # whether the backward pass recomputes the activations of each layer
    # Target tokens whose logits are computed at a time; None: MOST_LOGITS divided by the
    # vocabulary, 0: all.
    loss_chunk: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens in memory at a time."""
        return self.batch_size * self.length


@dataclasses.dataclass(frozen=True)
class Residuals:
    """Bytes per token that a traced model keeps for the backward pass."""

    fixed: float  # the part that does not depend on the sequence length
    by_length: float  # per token of sequence length: attention scores
    remat_fixed: float  # with rematerialization, without the layer being recomputed
    remat_by_length: float


# --- Parameters --------------------------------------------------------------------------------


def pair_size(inputs: int, outputs: int, rank: int) -> int:
    """Count the elements of the factors `a` (inputs, rank) and `b` (rank, outputs).

    Example:
      >>> pair_size(4096, 4096, 8), 4096 * 4096
      (65536, 16777216)
    """
    return rank * (inputs + outputs)


def reduction(inputs: int, outputs: int, rank: int) -> float:
    """Compute by what share the factors have fewer elements than the kernel.

    Example:
      >>> f"{reduction(4096, 4096, 8):.2%}"
      '99.61%'
    """
    return 1 - pair_size(inputs, outputs, rank) / (inputs * outputs)


def adapter_size(kernels: Iterable[KernelShape], rank: int) -> int:
    """Count the elements of the LoRA factors of several kernels."""
    return sum(kernel.pair_size(rank) for kernel in kernels)


# --- Memory between steps ----------------------------------------------------------------------


def weight_bytes(shape: ModelShape, itemsize: int, quantize: str = "none") -> float:
    """Compute the memory of the base weights.

    With `quantize`, `"int8"` or `"nf4"`, the dense kernels except the output head are quantized;
    the other weights have elements of `itemsize` bytes.
    """
    per_kernel = {"none": None, "int8": int8_bytes, "nf4": nf4_bytes}[quantize]
    if per_kernel is None:
        return shape.size * itemsize
    quantized = sum(per_kernel(k.inputs, k.outputs) * k.count for k in shape.linear)
    return quantized + (shape.size - sum(k.size for k in shape.linear)) * itemsize


def int8_bytes(inputs: int, outputs: int) -> float:
    """Compute the bytes of an int8 kernel: one per weight, and a float32 scale per output.

    Example:
      >>> int8_bytes(4096, 4096) / 4096**2
      1.0009765625
    """
    return inputs * outputs + 4 * outputs


def nf4_bytes(inputs: int, outputs: int) -> float:
    """Compute the bytes of an NF4 kernel: 4 bits per weight, and doubly quantized scales.

    Example:
      >>> f"{8 * nf4_bytes(4096, 4096) / 4096**2:.3f} bits per weight"
      '4.127 bits per weight'

    Reference:
      Dettmers et al., QLoRA (arXiv:2305.14314), section 3: scales take 0.127 bits per weight.
    """
    weights = inputs * outputs
    blocks = weights / NF4_BLOCK
    return weights / 2 + blocks + 4 * blocks / NF4_SCALES


def optimizer_bytes(trainable: int, itemsize: int, optimizer: str = "adamw") -> int:
    """Compute the memory of the optimizer state; an unknown optimizer counts as AdamW."""
    return STATE_SIZE.get(optimizer, STATE_SIZE["adamw"]) * trainable * itemsize


# --- Memory within a step ----------------------------------------------------------------------


def layer_bytes(shape: ModelShape, step: Step, itemsize: int, rank: int = 0, pairs: int = 0) -> int:
    """Compute the activation memory of one layer in bytes, as JAX keeps it for a Llama.

    Per token: the hidden states before and after the norms; queries, keys and values; attention
    scores before and after the softmax, one of them in float32; six arrays of the feed-forward
    block; and the input of each up-projection.
    """
    features = shape.num_heads * shape.head_dim
    norms = shape.float32_norms
    hidden = shape.hidden_size * (norms * 4 + (8 - norms) * itemsize)
    attention = (2 * features + 2 * shape.num_kv_heads * shape.head_dim) * itemsize
    scores = shape.num_heads * step.length * (4 + itemsize)
    feed_forward = 6 * shape.intermediate_size * itemsize
    return step.tokens * (hidden + attention + scores + feed_forward + rank * pairs * itemsize)


def activation_bytes(
    shape: ModelShape,
    step: Step,
    itemsize: int,
    rank: int = 0,
    pairs: int = 0,
    residuals: Residuals | None = None,
) -> float:
    """Compute the activation memory of all layers, by `layer_bytes` or from traced sizes.

    With `remat`, that is the inputs of all layers and most of the activations of one layer. `pairs`
    counts the adapted kernels per layer; for full fine-tuning, `rank` is 0.
    """
    if residuals is None:
        total = shape.num_layers * layer_bytes(shape, step, itemsize, rank, pairs)
        inputs = shape.num_layers * step.tokens * shape.hidden_size * itemsize
    else:
        total = step.tokens * (residuals.fixed + residuals.by_length * step.length)
        inputs = step.tokens * (residuals.remat_fixed + residuals.remat_by_length * step.length)
    return inputs + RECOMPUTED_SHARE * total / shape.num_layers if step.remat else total


def logit_bytes(shape: ModelShape, step: Step) -> int:
    """Compute the memory of one chunk of float32 logits and its gradient."""
    targets = step.batch_size * step.targets
    chunk = step.loss_chunk
    chunk = max(1, MOST_LOGITS // shape.vocab_size) if chunk is None else chunk or targets
    return 2 * 4 * min(chunk, targets) * shape.vocab_size


def float32_copy_bytes(shape: ModelShape, itemsize: int) -> int:
    """Compute the memory of the float32 copies of 16-bit weights in a step on a CPU.

    XLA for CPU multiplies in float32: it converts the output head, or the embedding that is used as
    one, as a whole, and the kernels of the layers one after the other.
    """
    if itemsize != 2:
        return 0
    largest = max((k.inputs * k.outputs for k in shape.body), default=0)
    return 4 * (shape.vocab_size * shape.hidden_size + largest)


# --- Floating-point operations -----------------------------------------------------------------


def forward_flops(shape: ModelShape, step: Step) -> int:
    """Count the operations of a forward pass without the output head: matmuls and attention."""
    return 2 * step.tokens * sum(k.active for k in shape.body) + attention_flops(shape, step)


def attention_flops(shape: ModelShape, step: Step) -> int:
    """Count the operations of the two attention products, masked positions included."""
    features = shape.num_heads * shape.head_dim
    return 4 * step.tokens * step.length * features * shape.num_layers


def head_flops(shape: ModelShape, step: Step) -> int:
    """Count the operations of the logits of the target tokens."""
    return 2 * step.batch_size * step.targets * shape.hidden_size * shape.vocab_size


def full_flops(shape: ModelShape, step: Step) -> int:
    """Count the operations of a step of full fine-tuning: three forward passes (6 N T)."""
    forward = forward_flops(shape, step)
    return step.accumulation * (3 * (forward + head_flops(shape, step)) + step.remat * forward)


def lora_flops(
    shape: ModelShape, step: Step, rank: int, adapted: Iterable[KernelShape] | None = None
) -> int:
    """Count the operations of a LoRA step: no gradients of base weights, but low-rank products.

    By default, all dense kernels except the output head and routers are adapted.
    """
    adapted = shape.linear if adapted is None else tuple(adapted)
    forward, head = forward_flops(shape, step), head_flops(shape, step)
    base_gradients = forward - attention_flops(shape, step) + head
    low_rank = 2 * step.tokens * sum(k.pair_size(rank) * k.active / k.size for k in adapted)
    total = 3 * (forward + head + low_rank) - base_gradients + step.remat * (forward + low_rank)
    return round(step.accumulation * total)
