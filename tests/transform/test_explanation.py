"""explain: every site with its form and the reason, as data and as a table."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import jax_lora as jl
from tests.lora_cases import adapt, random_tree

HERE = pathlib.Path(__file__).name


def model(params, tokens):
    x = params["embedding"][tokens]
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["up"]) @ layer["down"]
    return x @ jnp.linalg.qr(params["odd"])[0]


TREE = random_tree(
    {"embedding": (50, 8), "layers": [{"up": (8, 12), "down": (12, 8)}] * 2, "odd": (8, 8)}
)
TOKENS = jnp.arange(40).reshape(2, 20) % 50


def combined(fn=model, tree=TREE, args=(TOKENS,), targets=("embedding", "up", "down", "odd")):
    config = jl.LoraConfig(rank=2, targets=list(targets))
    kernels = {**jl.find_kernels(fn, tree, *args)}
    kernels.setdefault(
        "odd", jl.Kernel("odd", (8, 8), jnp.float32, "dense", (0,), (1,), (), 1, 0, False)
    )
    return jl.combine(tree, jl.lora_init(jax.random.key(0), tree, config, kernels=kernels))


def test_every_site_has_its_form_and_the_reason():
    sites = jl.explain(model, combined(), TOKENS).sites
    assert [(site.path, site.operation, site.form, site.tokens) for site in sites] == [
        ("embedding", "gather", "factored", 40),
        ("layers/0/up", "dot_general", "merged", 40),
        ("layers/0/down", "dot_general", "merged", 40),
        ("layers/1/up", "dot_general", "merged", 40),
        ("layers/1/down", "dot_general", "merged", 40),
        ("odd", "qr", "materialized", 0),
    ]
    assert [(site.inputs, site.outputs, site.rank) for site in sites][1:3] == [
        (8, 12, 2),
        (12, 8, 2),
    ]
    assert all(HERE in site.where for site in sites)


def test_the_table_puts_layers_that_are_alike_in_one_row():
    lines = str(jl.explain(model, combined(), TOKENS)).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "kernel",
        "embedding",
        "layers/*/up (2)",
        "layers/*/down (2)",
        "odd",
    ]
    assert lines[0].split() == [
        "kernel",
        "form",
        "tokens",
        "in",
        "out",
        "rank",
        "runs",
        "at",
        "why",
    ]
    assert "merged" in lines[2] and "40 tokens, at least 5: merging costs less" in lines[2]
    assert "materialized" in lines[4] and "qr: no low-rank rule for this operation" in lines[4]
    assert len({line.index("factored") for line in lines if "factored" in line}) == 1


def test_a_selected_form_is_shown_as_such():
    sites = jl.explain(model, combined(), TOKENS, form="factored").sites
    assert {site.why for site in sites if site.operation == "dot_general"} == {
        "selected by the caller"
    }


def test_kernels_that_share_are_named_and_scans_are_counted():
    def scanned(params, x):
        step = lambda x, w: (x @ w["up"] + x @ w["gate"], None)  # noqa: E731
        return jax.lax.scan(jax.checkpoint(step), x, params)[0]

    tree, x = random_tree({"up": (5, 6, 6), "gate": (5, 6, 6)}), jnp.ones((4, 6))
    explanation = jl.explain(scanned, jl.combine(tree, adapt(scanned, tree, x)), x)
    assert {site.path: (site.times, site.beside) for site in explanation.sites} == {
        "up": (5, ("gate",)),
        "gate": (5, ("up",)),
    }
    assert "shares x with 1 more" in str(explanation)


def test_shapes_are_enough():
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (combined(), TOKENS)
    )
    assert jl.explain(model, *abstract).sites == jl.explain(model, combined(), TOKENS).sites


def test_a_tree_without_an_adapter_is_refused():
    with pytest.raises(jl.errors.StructureError) as error:
        jl.explain(model, TREE, TOKENS)
    for part in (
        "explain",
        "without any LoraWeight",
        "jl.combine(variables, adapter)",
    ):
        assert part in str(error.value)
