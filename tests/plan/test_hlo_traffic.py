"""Traffic and collectives are counted from the text of an optimized function."""

import jax
import jax.numpy as jnp
import pytest

from jax_lora.plan.hlo_traffic import array_bytes, hlo_traffic

KIB = 1024  # bytes of f32[256]


def module(entry, *computations):
    """A module with the lines of its entry computation."""
    lines = "\n  ".join(entry)
    return "\n\n".join(
        ["HloModule test", *computations, f"ENTRY %main () -> f32[] {{\n  {lines}\n}}"]
    )


def computation(name, *lines):
    return f"%{name} (p: f32[]) -> f32[] {{\n  " + "\n  ".join(lines) + "\n}"


def traffic(*entry, computations=()):
    return hlo_traffic(module(entry, *computations)).bytes


X = "%x = f32[256]{0} parameter(0)"
Y = "%y = f32[256]{0} parameter(1)"


def test_an_operation_reads_its_operands_and_writes_its_result():
    assert traffic(X, Y, "ROOT %z = f32[256]{0} add(%x, %y)") == 3 * KIB


@pytest.mark.parametrize("kind", ["bitcast", "tuple", "get-tuple-element", "optimization-barrier"])
def test_operations_that_move_nothing_are_free(kind):
    assert traffic(X, f"ROOT %z = f32[256]{{0}} {kind}(%x)") == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0}", 12),
        ("(s4[6]{0}, pred[5]{0})", 8),
        ("f8e4m3fn[7]{0}", 7),
        ("token[]", 0),
    ],
)
def test_the_size_of_a_type_is_the_sum_of_its_arrays(text, size):
    assert array_bytes(text) == size


def test_arrays_in_on_chip_memory_do_not_count():
    assert traffic(X, "ROOT %z = f32[256]{0:T(256)S(1)} negate(%x)") == KIB
    assert array_bytes("f32[256]{0:T(256)S(1)}", on_chip=False) == 0


def test_the_results_of_custom_calls_count():
    text = 'ROOT %z = (f32[256]{0}, s8[1024]{0}) custom-call(%x), custom_call_target="kernel"'
    assert traffic(X, text) == 3 * KIB


BODY = computation(
    "body",
    "%p = (s32[], f32[256]{0}) parameter(0)",
    "%a = f32[256]{0} get-tuple-element(%p), index=1",
    "%b = f32[256]{0} negate(%a)",
    "%i = s32[] get-tuple-element(%p), index=0",
    "ROOT %t = (s32[], f32[256]{0}) tuple(%i, %b)",
)
CONDITION = computation(
    "condition",
    "%p.1 = (s32[], f32[256]{0}) parameter(0)",
    "%most = s32[] constant(7)",
    "ROOT %less = pred[] compare(%p.1, %most), direction=LT",
)


def loop(rest=""):
    return (
        "%start = (s32[], f32[256]{0}) parameter(0)",
        "ROOT %w = (s32[], f32[256]{0}) while(%start), condition=%condition, body=%body" + rest,
    )


def test_the_body_of_a_loop_counts_once_per_iteration():
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    assert traffic(*loop(known), computations=(BODY, CONDITION)) == 5 * 2 * KIB


def test_the_iterations_are_read_from_the_condition_if_they_are_not_known():
    assert traffic(*loop(), computations=(BODY, CONDITION)) == 7 * 2 * KIB


def test_loops_inside_loops_multiply():
    outer = BODY.replace("%body ", "%outer ").replace(
        "negate(%a)",
        "while(%a), condition=%condition, body=%body"
        ', backend_config={"known_trip_count":{"n":"3"}}',
    )
    text = loop(', backend_config={"known_trip_count":{"n":"2"}}')
    text = (text[0], text[1].replace("body=%body", "body=%outer"))
    assert traffic(*text, computations=(BODY, CONDITION, outer)) == 2 * 3 * 2 * KIB


def test_a_called_computation_counts():
    called = computation("f", X, "ROOT %n = f32[256]{0} negate(%x)")
    text = "ROOT %z = f32[256]{0} call(%x), to_apply=%f"
    assert traffic(X, text, computations=(called,)) == 2 * KIB


def test_a_slice_reads_as_much_as_it_writes():
    stack = "%stack = f32[8,256]{1,0} parameter(0)"
    i = "%i = s32[] parameter(1)"
    text = "ROOT %z = f32[1,256]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,256}"
    assert traffic(stack, i, text) == 2 * KIB


SLICING = computation(
    "fused",
    "%stack = f32[8,256]{1,0} parameter(0)",
    "%i = s32[] parameter(1)",
    "%cut = f32[1,256]{1,0} dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,256}",
    "ROOT %n = f32[1,256]{1,0} negate(%cut)",
)
OPERANDS = ("%stack.1 = f32[8,256]{1,0} parameter(0)", "%i.1 = s32[] parameter(1)")
FUSION = "ROOT %z = f32[1,256]{1,0} fusion(%stack.1, %i.1), kind=kLoop, calls=%fused"


def test_a_fusion_reads_the_slices_that_it_uses():
    assert traffic(*OPERANDS, FUSION, computations=(SLICING,)) == 2 * KIB + 4


def test_a_fusion_that_also_uses_the_whole_operand_reads_all_of_it():
    both = SLICING.replace("negate(%cut)", "custom(%cut, %stack)")
    assert traffic(*OPERANDS, FUSION, computations=(both,)) == 9 * KIB + 4


def test_an_update_in_place_moves_the_update_only():
    stack, x, i = OPERANDS[0], "%x.1 = f32[1,256]{1,0} parameter(2)", OPERANDS[1]
    text = "ROOT %z = f32[8,256]{1,0} dynamic-update-slice(%stack.1, %x.1, %i.1, %i.1)"
    assert traffic(stack, x, i, text) == 2 * KIB


def test_a_fusion_that_updates_in_place_writes_the_update_only():
    fused = computation(
        "fused",
        "%stack = f32[8,256]{1,0} parameter(0)",
        "%i = s32[] parameter(1)",
        "%x = f32[1,256]{1,0} parameter(2)",
        "%n = f32[1,256]{1,0} negate(%x)",
        "%u = f32[8,256]{1,0} dynamic-update-slice(%stack, %n, %i, %i)",
        "ROOT %b = f32[8,256]{1,0} bitcast(%u)",
    )
    text = "ROOT %z = f32[8,256]{1,0} fusion(%stack.1, %i.1, %x.1), kind=kLoop, calls=%fused"
    x = "%x.1 = f32[1,256]{1,0} parameter(2)"
    assert traffic(*OPERANDS, x, text, computations=(fused,)) == 2 * KIB + 4


def test_collectives_are_counted_by_kind_and_are_memory_traffic_too():
    text = module(
        (
            X,
            "%g = f32[1024]{0} all-gather(%x), dimensions={0}",
            "%r = f32[256]{0} all-reduce(%x), to_apply=%add",
            "ROOT %s = f32[256]{0} all-reduce(%r), to_apply=%add",
        )
    )
    found = hlo_traffic(text)
    assert {kind: (each.count, each.bytes) for kind, each in found.collectives.items()} == {
        "all-gather": (1, 4 * KIB),
        "all-reduce": (2, 2 * KIB),
    }
    collective_bytes = sum(each.bytes for each in found.collectives.values())
    assert collective_bytes == 6 * KIB
    assert found.bytes >= collective_bytes


def test_an_asynchronous_collective_counts_once_with_the_size_of_its_result():
    text = module(
        (
            X,
            "%s = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), dimensions={0}",
            "ROOT %d = f32[1024]{0} all-gather-done(%s)",
        )
    )
    (found,) = hlo_traffic(text).collectives.values()
    assert (found.count, found.bytes) == (1, 4 * KIB)


def test_combined_collectives_count_all_results():
    text = module(
        (
            X,
            "%y = f32[256]{0} negate(%x)",
            "%s = ((f32[256]{0}, f32[256]{0}), (f32[1024]{0}, f32[1024]{0}))"
            " all-gather-start(%x, %y), dimensions={0}",
            "ROOT %d = (f32[1024]{0}, f32[1024]{0}) all-gather-done(%s)",
        )
    )
    (found,) = hlo_traffic(text).collectives.values()
    assert (found.count, found.bytes) == (1, 8 * KIB)


def test_a_collective_in_a_loop_counts_once_per_iteration():
    body = BODY.replace("negate(%a)", "all-reduce(%a), to_apply=%add")
    known = ', backend_config={"known_trip_count":{"n":"5"}}'
    found = hlo_traffic(module(loop(known), body, CONDITION)).collectives["all-reduce"]
    assert (found.count, found.bytes) == (5, 5 * KIB)


def test_a_compiled_scan_is_counted_with_its_iterations():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    def count(layers):
        shapes = (64, 64), (layers, 64, 64)
        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return hlo_traffic(jax.jit(f).lower(*shapes).compile().as_text()).bytes

    four, eight = count(4), count(8)
    weights = 64 * 64 * 4
    assert 4 * 3 * weights <= eight - four <= 4 * 12 * weights
