"""Programs whose collectives and reads are known: written by hand, and compiled for TPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qwen_jax.sharding import aot, hlo
from qwen_jax.sharding.axes import read_mesh
from qwen_jax.sharding.chips import read_topology

needs_libtpu = pytest.mark.skipif(
    not aot.has_compiler(), reason="libtpu is not installed (requirements-dev.txt)"
)

# As XLA prints programs for TPUs, cut short: a gather in a loop of 6 turns by an asynchronous pair
# of instructions, one in pieces inside of fusions, a reduce-scatter as a fusion of an all-reduce.
PROGRAM = """\
HloModule jit_f, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), channel_id=5, \
replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[2,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %zero), \
dynamic_slice_sizes={2,16}
}

%start (p: bf16[4,16]) -> (bf16[4,16], bf16[8,16]) {
  %p = bf16[4,16]{1,0:T(8,128)} parameter(0)
  %all-gather.5 = bf16[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=13, \
replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}, \
metadata={op_name="jit(f)/transpose(jvp())/layer_3/mlp/dot_general"}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %custom-call = (bf16[4,16]{1,0}, bf16[8,16]{1,0}) custom-call(%all-gather.5), \
custom_call_target="AsyncCollectiveStart"
}

%piece (q: bf16[4,16], r: bf16[8,16]) -> bf16[8,16] {
  %q = bf16[4,16]{1,0} parameter(0)
  %r = bf16[8,16]{1,0} parameter(1)
  ROOT %all-gather.6 = bf16[8,16]{1,0:T(8,128)} all-gather(%q), channel_id=13, \
replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
}

%body (carry: (s32[], bf16[4,16], f32[8,16])) -> (s32[], bf16[4,16], f32[8,16]) {
  %carry = (s32[], bf16[4,16]{1,0}, f32[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[4,16]{1,0} get-tuple-element(%carry), index=1
  %all-gather-start = (bf16[4,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%w), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %all-gather-done = bf16[32,16]{1,0} all-gather-done(%all-gather-start)
  %a = f32[8,16]{1,0} get-tuple-element(%carry), index=2
  %scattered = f32[2,16]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter, \
metadata={op_name="jit(f)/jvp()/while/body/layer_2/self_attn/o_proj/dot_general"}
  ROOT %result = (s32[], bf16[4,16]{1,0}, f32[8,16]{1,0}) tuple(%next, %w, %a)
}

%condition (carry.1: (s32[], bf16[4,16], f32[8,16])) -> pred[] {
  %carry.1 = (s32[], bf16[4,16]{1,0}, f32[8,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%j, %six), direction=LT
}

ENTRY %main (w.1: bf16[4,16], a.1: f32[8,16]) -> f32[8,16] {
  %w.1 = bf16[4,16]{1,0:T(8,128)} parameter(0), metadata={op_name="params[\\'w\\']"}
  %a.1 = f32[8,16]{1,0:T(8,128)} parameter(1), metadata={op_name="a"}
  %begin = s32[] constant(0)
  %copied = s32[] copy(%begin)
  %start.1 = (bf16[4,16]{1,0}, bf16[8,16]{1,0}) fusion(%w.1), kind=kCustom, calls=%start
  %part = bf16[8,16]{1,0} get-tuple-element(%start.1), index=1
  %piece.1 = bf16[8,16]{1,0} fusion(%w.1, %part), kind=kCustom, calls=%piece
  %init = (s32[], bf16[4,16]{1,0}, f32[8,16]{1,0}) tuple(%copied, %w.1, %a.1)
  %loop = (s32[], bf16[4,16]{1,0}, f32[8,16]{1,0}) while(%init), condition=%condition, body=%body
  %around = f32[8,16]{1,0} collective-permute(%a.1), channel_id=2, \
source_target_pairs={{0,1},{1,0},{2,3},{3,2}}
  %split = f32[8,16]{1,0} all-to-all(%around), channel_id=3, replica_groups={{0,1},{2,3}}, \
dimensions={0}
  %alone = f32[8,16]{1,0} all-reduce(%split), channel_id=4, replica_groups={{0},{1}}, to_apply=%add
  ROOT %out = f32[8,16]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_collectives_are_counted_once_and_as_often_as_their_loop_turns():
    found = hlo.collectives(hlo.read_module(PROGRAM))
    small, large = 8 * 16 * 2, 8 * 16 * 4
    assert [(c.kind, c.bytes, c.group, c.times, c.sent) for c in found] == [
        ("all-gather", small, 2, 1, small // 2),
        ("all-gather", 4 * small, 8, 6, 4 * small * 7 // 8),
        ("reduce-scatter", large, 4, 6, large * 3 // 4),
        ("collective-permute", large, 2, 1, large),
        ("all-to-all", large, 2, 1, large // 2),
    ]
    assert all(c.is_counted for c in found)
    assert found[0].op_name == "jit(f)/transpose(jvp())/layer_3/mlp/dot_general"
    assert found[2].op_name.endswith("layer_2/self_attn/o_proj/dot_general")


def test_an_all_reduce_sends_its_array_twice():
    text = PROGRAM.replace("replica_groups={{0},{1}}", "replica_groups={{0,1,2,3},{4,5,6,7}}")
    last = hlo.collectives(hlo.read_module(text))[-1]
    assert (last.kind, last.group, last.sent) == ("all-reduce", 4, 2 * 8 * 16 * 4 * 3 // 4)


def test_a_loop_by_data_counts_once_and_says_so():
    text = PROGRAM.replace("%begin = s32[] constant(0)", "%begin = s32[] custom-call()")
    found = hlo.collectives(hlo.read_module(text))
    assert [c.times for c in found] == [1] * 5
    assert [c.is_counted for c in found] == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("old", "new", "turns"),
    [
        ("%six = s32[] constant(6)", "%six = s32[] constant(9)", 9),
        ("%begin = s32[] constant(0)", "%begin = s32[] constant(2)", 4),
        ("%one = s32[] constant(1)", "%one = s32[] constant(4)", 2),
        ("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}', 5),
    ],
)
def test_turns_of_a_loop_follow_from_start_bound_and_step(old, new, turns):
    assert old in PROGRAM
    found = hlo.collectives(hlo.read_module(PROGRAM.replace(old, new)))
    assert [c.times for c in found] == [1, turns, turns, 1, 1]


def test_reads_follow_arguments_into_loops_and_fusions():
    reads = hlo.argument_reads(hlo.read_module(PROGRAM))
    size = 4 * 16 * 2
    # Twice in fusions, and in each of the six turns.
    assert reads["params['w']"] == hlo.Reads(size, 8 * size, 0)
    assert reads["params['w']"].times == 8
    # By the permutation, and in each turn whole.
    assert reads["a"].times == 7


@pytest.mark.parametrize(
    ("use", "read", "copied"),
    [
        ("%u = bf16[4,16]{0,1} copy(%w.1)", 1, 1),
        ("%u = bf16[4,16]{1,0:S(1)} copy(%w.1)", 1, 0),
        ("%u = bf16[1,16]{1,0} slice(%w.1), slice={[0:1], [0:16]}", 0.25, 0),
        ("%u = bf16[1,16]{1,0} dynamic-slice(%w.1, %begin, %begin)", 0.25, 0),
        ("%u = bf16[4,16]{1,0} dynamic-update-slice(%w.1, %x, %begin, %begin)", 0, 0),
        # What the next run finds there, and this one found.
        ("%u = (bf16[4,16]{1,0:S(1)}, bf16[4,16]{1,0}, u32[]) copy-start(%w.1)", 0, 0),
        (
            "%v = (bf16[4,16]{1,0:S(1)}, bf16[4,16]{1,0}, u32[]) copy-start(%w.1)\n"
            "  %u = bf16[4,16]{1,0:S(1)} copy-done(%v)\n"
            "  %t = bf16[4,16]{1,0} negate(%u)\n  %s = bf16[4,16]{1,0} negate(%u)",
            1,
            0,
        ),
        ("%u = bf16[2,32]{1,0} bitcast(%w.1)\n  %t = bf16[2,32]{1,0} negate(%u)", 1, 0),
    ],
)
def test_reads_of_single_instructions(use, read, copied):
    text = PROGRAM.replace("  %copied = ", f"  {use}\n  %copied = ")
    before = hlo.argument_reads(hlo.read_module(PROGRAM))["params['w']"]
    after = hlo.argument_reads(hlo.read_module(text))["params['w']"]
    assert after.read - before.read == read * before.bytes
    assert after.copied == copied * before.bytes


# A buffer that is written in place three ways, one after the other, before the last instruction.
WRITTEN = """\
HloModule jit_f, num_partitions=1

%write (p: bf16[4,16], q: bf16[1,16], at: s32[]) -> (f32[2], bf16[4,16]) {
  %q = bf16[1,16]{1,0} parameter(1)
  %p = bf16[4,16]{1,0} parameter(0)
  %at = s32[] parameter(2)
  %same = bf16[4,16]{1,0} bitcast(%p)
  %written = bf16[4,16]{1,0} dynamic-update-slice(%same, %q, %at, %at)
  %other = f32[2]{0} constant({0, 0})
  ROOT %both = (f32[2]{0}, bf16[4,16]{1,0}) tuple(%other, %written)
}

ENTRY %main (cache: bf16[4,16], new: bf16[1,16], i: s32[]) -> bf16[4,16] {
  %cache = bf16[4,16]{1,0} parameter(0), metadata={op_name="cache"}
  %new = bf16[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %first = bf16[4,16]{1,0} dynamic-update-slice(%cache, %new, %i, %i)
  %second = (f32[2]{0}, bf16[4,16]{1,0}) fusion(%first, %new, %i), kind=kLoop, calls=%write
  %taken = bf16[4,16]{1,0} get-tuple-element(%second), index=1
  %kernel = (f32[2]{0}, bf16[4,16]{1,0}) custom-call(%new, %taken), \
custom_call_target="tpu_custom_call", output_to_operand_aliasing={{1}: (1, {})}
  %third = bf16[4,16]{1,0} get-tuple-element(%kernel), index=1
  ROOT %last = bf16[4,16]{0,1} copy(%third)
}
"""


def test_copies_of_what_was_written_in_place_are_found():
    size = 4 * 16 * 2
    # The kernel is taken to read it whole, and the copy does.
    assert hlo.argument_reads(hlo.read_module(WRITTEN))["cache"] == hlo.Reads(size, 2 * size, size)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("copy(%third)", "bitcast(%third)"),
        # The last reads another result than the buffer.
        ("(%kernel), index=1", "(%kernel), index=0"),
        ("{{1}: (1, {})}", "{{1}: (0, {})}"),
        ("(%second), index=1", "(%second), index=0"),
        ("dynamic-update-slice(%same", "dynamic-slice(%same"),
    ],
)
def test_what_is_not_that_buffer_or_no_copy_of_it_does_not_count(old, new):
    assert old in WRITTEN
    assert hlo.argument_reads(hlo.read_module(WRITTEN.replace(old, new)))["cache"].copied == 0


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.read_module("HloModule jit_f\n")


def test_bytes_of_shapes():
    assert hlo.shape_bytes("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}") == 30
    assert hlo.shape_bytes("(f32[2]{0}, pred[7]{0}, s4[3]{0}, u8[])") == 8 + 7 + 2 + 1
    assert hlo.shape_bytes("(f8e4m3fn[4]{0}, token[])") == 4


@needs_libtpu
def test_a_scan_over_layers_cut_along_two_axes_has_the_collectives_it_must_have():
    """A gather of each weight a layer, and of the product of its halves one sum over tensor."""
    mesh = aot.make_mesh(read_topology("v5e:2x4"), read_mesh("fsdp:4,tensor:2"))
    layers, N, D, F = 6, 512, 1024, 2048

    def place(*axes):
        return NamedSharding(mesh, P(*axes))

    def layer(x, weights):
        up, down = (jax.lax.with_sharding_constraint(w, place(None, "tensor")) for w in weights)
        with jax.named_scope("mlp"):
            y = jax.lax.with_sharding_constraint(jnp.tanh(x @ up), place("fsdp", "tensor"))
            y = y @ down.T
        return jax.lax.with_sharding_constraint(y, place("fsdp", None)), None

    x = jax.ShapeDtypeStruct((N, D), jnp.bfloat16, sharding=place("fsdp", None))
    w = jax.ShapeDtypeStruct((layers, D, F), jnp.bfloat16, sharding=place(None, "fsdp", "tensor"))
    run = jax.jit(lambda x, *w: jax.lax.scan(layer, x, w)[0], out_shardings=place("fsdp", None))
    found = hlo.collectives(hlo.read_module(aot.compile_program(run.lower(x, w, w)).hlo))
    gathers = [c for c in found if c.kind == "all-gather" and c.group == 4]
    assert sum(c.times * c.bytes for c in gathers) == layers * 2 * D * (F // 2) * 2
    sums = [c for c in found if c.group == 2]
    # One all-reduce, or a reduce-scatter and the gather of what it leaves.
    assert sum(c.times * c.sent for c in sums) == layers * (N // 4) * D * 2
    assert {c.kind for c in sums} <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert any("mlp" in c.op_name for c in sums)
    assert all(c.is_counted for c in found)


def test_what_a_kernel_notes_of_itself_may_have_lines_of_its_own():
    module = hlo.read_module(
        """HloModule jit_f, entry_computation_layout={()->f32[]}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %kernel = f32[8]{0} custom-call(%x), frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block\\": 512, \\"window\\": null}"
}}, metadata={op_name="jit(f)/pallas_call"}
}
"""
    )
    assert module.entry.root.opcode == "custom-call"
    assert module.entry.root.op_name == "jit(f)/pallas_call"


def test_turns_after_the_first_are_counted_for_every_form_of_a_convolution():
    """Forms that XLA prints for products: plain, summed over a window, spread out by padding."""
    program = """\
HloModule jit_f, num_partitions=1

%body (carry: (s32[], f32[4,6])) -> (s32[], f32[4,6]) {
  %carry = (s32[], f32[4,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %a = f32[4,6]{1,0} get-tuple-element(%carry), index=1
  %w = f32[5,6]{1,0} constant({...})
  %plain = f32[4,5]{1,0} convolution(%a, %w), dim_labels=bf_oi->bf
  %x3 = f32[3,4,6]{2,1,0} constant({...})
  %w3 = f32[3,4,5]{2,1,0} constant({...})
  %summed = f32[6,5,1]{1,0,2} convolution(%x3, %w3), window={size=3}, dim_labels=0fb_0io->bf0
  %x4 = f32[1,4,6]{2,1,0} constant({...})
  %w4 = f32[2,4,5]{2,1,0} constant({...})
  %spread = f32[6,5,2]{1,0,2} convolution(%x4, %w4), window={size=2 pad=1_1 rhs_reversal=1}, \
dim_labels=0fb_0io->bf0
  ROOT %result = (s32[], f32[4,6]{1,0}) tuple(%next, %a)
}

%condition (carry.1: (s32[], f32[4,6])) -> pred[] {
  %carry.1 = (s32[], f32[4,6]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  %seven = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %seven), direction=LT
}

ENTRY %main (a.1: f32[4,6]) -> (s32[], f32[4,6]) {
  %a.1 = f32[4,6]{1,0} parameter(0)
  %w.1 = f32[5,6]{1,0} constant({...})
  %once = f32[4,5]{1,0} convolution(%a.1, %w.1), dim_labels=bf_oi->bf
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,6]{1,0}) tuple(%zero, %a.1)
  ROOT %loop = (s32[], f32[4,6]{1,0}) while(%start), condition=%condition, body=%body
}
"""
    products = 2 * (4 * 6 * 5 + 3 * 4 * 6 * 5 + 2 * 4 * 6 * 5)
    assert hlo.repeated_flops(hlo.read_module(program)) == 6 * products
