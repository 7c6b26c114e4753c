"""The decoder of `decoder.py` in torch, adapted with PEFT. Requires torch and peft."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import peft  # type: ignore[import-not-found]
import torch  # type: ignore[import-not-found]
import torch.nn.functional as F  # type: ignore[import-not-found] # noqa: N812
from torch import nn  # type: ignore[import-not-found]
from torch.utils.flop_counter import FlopCounterMode  # type: ignore[import-not-found]

from benchmarks import trees
from benchmarks.decoder import PROJECTIONS, Size
from benchmarks.forms import Case, Weights


def _attend(q: Any, k: Any, v: Any) -> Any:
    """Compute causal attention without fused kernels from (batch, heads, length, head_dim)."""
    length, head_dim = q.shape[-2:]
    scores = q @ k.transpose(-1, -2) / head_dim**0.5  # (b, h, t, t)
    visible = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()  # (t, t)
    weights = torch.softmax(scores.float().masked_fill(~visible, -1e30), -1).to(v.dtype)
    return weights @ v  # (b, h, t, d)


def _attend_fused(q: Any, k: Any, v: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class _Block(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    def __init__(self, size: Size, attend: Callable[..., Any]):
        super().__init__()
        keys = size.key_heads * size.head_dim
        self.size, self.attend = size, attend
        self.attention_norm = nn.RMSNorm(size.width, eps=1e-6)
        self.feed_forward_norm = nn.RMSNorm(size.width, eps=1e-6)
        self.q_proj = nn.Linear(size.width, size.width, bias=False)
        self.k_proj = nn.Linear(size.width, keys, bias=False)
        self.v_proj = nn.Linear(size.width, keys, bias=False)
        self.o_proj = nn.Linear(size.width, size.width, bias=False)
        self.gate_proj = nn.Linear(size.width, size.hidden, bias=False)
        self.up_proj = nn.Linear(size.width, size.hidden, bias=False)
        self.down_proj = nn.Linear(size.hidden, size.width, bias=False)

    def forward(self, x: Any) -> Any:
        """Map x (batch, length, width) to the same shape."""
        h = self.attention_norm(x)
        q, k, v = map(self._split, (self.q_proj(h), self.k_proj(h), self.v_proj(h)))
        if (shared := self.size.heads // self.size.key_heads) > 1:
            k, v = (part.repeat_interleave(shared, dim=1) for part in (k, v))  # (b, h, t, d)
        y = self.attend(q, k, v).transpose(1, 2).reshape(x.shape)  # (b, t, width)
        x = x + self.o_proj(y)
        h = self.feed_forward_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def _split(self, y: Any) -> Any:
        return y.reshape(*y.shape[:2], -1, self.size.head_dim).transpose(1, 2)  # (b, h, t, d)


class _Decoder(nn.Module):  # pyright: ignore[reportUntypedBaseClass]
    def __init__(self, size: Size, attend: Callable[..., Any]):
        super().__init__()
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(_Block(size, attend) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, eps=1e-6)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, tokens: Any) -> Any:
        """Map tokens (batch, length) to logits (batch, length, vocabulary)."""
        x = self.embed(tokens)  # (b, t, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -----------------------------------------------------------------------------------------------
# A training step
# -----------------------------------------------------------------------------------------------


class PeftRun:
    """A training step with PEFT, with the same weights and tokens as the JAX rows.

    Args:
      case: The model, batch and settings.
      weights: The initial weights.
      device: "cpu" or "cuda".
      compiled: Whether `torch.compile` compiles the model.
      fused_attention: Whether to use `scaled_dot_product_attention`.
    """

    def __init__(
        self, case: Case, weights: Weights, device: str, compiled: bool, fused_attention: bool
    ):
        """Build the model and run the first step, which compiles."""
        self._device = device
        attend = _attend_fused if fused_attention else _attend
        with torch.device("meta"):
            model = _Decoder(case.size, attend)
        model.load_state_dict(_state(weights, device), assign=True)
        settings = peft.LoraConfig(
            r=case.rank, lora_alpha=case.alpha, target_modules=list(PROJECTIONS), lora_dropout=0.0
        )
        adapted: Any = peft.get_peft_model(model, settings)  # type: ignore[arg-type]
        _load_factors(adapted, weights)
        self.loss = 0.0
        self._model = torch.compile(adapted) if compiled else adapted
        trained = [each for each in adapted.parameters() if each.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-4)
        self._tokens = torch.tensor(np.asarray(weights.tokens), dtype=torch.long, device=device)
        self.first_loss, self.first_seconds = 0.0, 0.0
        self.first_seconds = self.step()
        self.first_loss = self.loss
        self.step()

    def step(self) -> float:
        """Run one step and return its time in seconds."""
        start = time.perf_counter()
        loss = self._train()
        if self._device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.loss = float(loss)
        return seconds

    def flops(self) -> float:
        """Count the matmul FLOPs of one step."""
        with FlopCounterMode(display=False) as counter:
            self._train()
        return float(counter.get_total_flops())

    def _train(self) -> Any:
        logits = self._model(self._tokens)[:, :-1].float()  # (b, t - 1, vocabulary)
        loss = F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def _tensor(array: Any, device: str) -> Any:
    wide = torch.tensor(np.asarray(array, np.float32), device=device)
    return wide.to(torch.bfloat16) if str(array.dtype) == "bfloat16" else wide


def _state(weights: Weights, device: str) -> dict[str, Any]:
    state = {}
    for path, leaf in trees.flatten(weights.base["params"]).items():
        *module, kind = path.replace("block_", "blocks/").split("/")
        tensor = _tensor(leaf, device)
        # torch stores kernels as (out, in).
        state[".".join([*module, "weight"])] = tensor.T.contiguous() if kind == "kernel" else tensor
    return state


def _load_factors(adapted: Any, weights: Weights) -> None:
    parameters = dict(adapted.named_parameters())
    for path, pair in weights.factors.items():
        module = path.removeprefix("params/").removesuffix("/kernel").replace("block_", "blocks/")
        for name, factor in zip("AB", pair, strict=True):
            inner = module.replace("/", ".")
            parameter = parameters[f"base_model.model.{inner}.lora_{name}.default.weight"]
            with torch.no_grad():
                parameter.copy_(torch.tensor(np.asarray(factor).T))
