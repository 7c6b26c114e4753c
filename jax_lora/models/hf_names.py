"""Where each parameter of `Llama` stands in a Hugging Face checkpoint.

One table serves loading, saving and adapter export, so the three cannot disagree.
"""

from jax_lora.models.llama_config import LlamaConfig

__all__ = ["kernel_names", "tensor_names"]


def kernel_names(config: LlamaConfig) -> dict[str, str]:
    """Kernel path in the parameters -> Hugging Face module name ("{layer}" for stacked ones).

    Example:
      >>> kernel_names(LlamaConfig())["layers/attn/q_proj/kernel"]
      'model.layers.{layer}.self_attn.q_proj'
    """
    names = {"embed_tokens/embedding": "model.embed_tokens"}
    for part, module, projections in (
        ("attn", "self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        for name in projections:
            names[f"layers/{part}/{name}/kernel"] = f"model.layers.{{layer}}.{module}.{name}"
    if not config.tie_word_embeddings:
        names["lm_head/kernel"] = "lm_head"
    return names


def tensor_names(config: LlamaConfig) -> dict[str, str]:
    """Every parameter's path -> the name of its tensor in the checkpoint's files."""
    kernels = kernel_names(config)
    names = {path: f"{module}.weight" for path, module in kernels.items()}
    for part, biased in (("attn", config.attention_bias), ("mlp", config.mlp_bias)):
        for path, module in kernels.items():
            if biased and path.startswith(f"layers/{part}/"):
                names[path.removesuffix("kernel") + "bias"] = f"{module}.bias"
    names["layers/input_norm/scale"] = "model.layers.{layer}.input_layernorm.weight"
    names["layers/post_attention_norm/scale"] = (
        "model.layers.{layer}.post_attention_layernorm.weight"
    )
    names["norm/scale"] = "model.norm.weight"
    return names
