"""The parser against hand arithmetic: programs of this machine, and the forms TPU programs take."""

from pathlib import Path

import pytest
from eight_devices import on_eight_devices

from gqa_scaling.sweep.hlo import Array, Program


@pytest.fixture(scope="module")
def modules():
    return on_eight_devices(Path(__file__).with_name("hlo_modules.py"))[0]


def test_a_scan_counts_each_of_its_layers(modules):
    found = modules["layers"]
    assert found["exact"]
    assert found["devices"] == 8
    assert found["flops"] == 5 * 2 * 8 * 64 * 64
    assert found["collectives"] == [
        ["all-gather", "f32", [64, 64], 4, 64 * 64 * 4 * 3 / 4, 5],
        ["all-reduce", "f32", [8, 64], 2, 2 * 8 * 64 * 4 / 2, 5],
    ]


def test_exchanges_and_nested_loops(modules):
    found = modules["exchanges"]
    scattered, exchanged, passed = (
        next(c for c in found["collectives"] if c[0] == kind)
        for kind in ("reduce-scatter", "all-to-all", "collective-permute")
    )
    assert scattered[3:] == [4, 8 * 64 * 4 * 3 / 4, 1]
    assert exchanged[3:] == [2, 2 * 64 * 4 / 2, 1]
    assert passed[4:] == [4 * 32 * 4, 15]
    assert len(found["collectives"]) == 3


def test_a_loop_that_data_decide_takes_its_mean(modules):
    """Rows take 1, 2, 3, 4 and 5 turns, 3 on average."""
    found = modules["triangle"]
    assert not found["exact"]
    assert found["flops"] == 15 * 2 * (2 * 8 * 64 * 8)


# ------------------------------------------------------------------------- as TPU programs say it

TPU_LOOP = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%body (p: (s32[], f32[8,64], s32[])) -> (s32[], f32[8,64], s32[]) {
  %one = s32[]{:T(128)} constant(1)
  %p = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)S(1)}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,64]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  %y = f32[8,64]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups=mesh['x'=4,'y'=4] {'x':(1)2,'y'}, to_apply=%sum, metadata={op_name="jit(step)/psum"}
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %t = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%next, %y, %n)
}

%condition (p: (s32[], f32[8,64], s32[])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %zero = s32[]{:T(128)} constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %end = s32[]{:T(128)} constant(36)
  %x = f32[8,64]{1,0:T(8,128)} parameter(0)
  %t = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, s32[]{:T(128)}) tuple(%start, %x, %end)
  %w = (s32[]{:T(128)}, f32[8,64]{1,0:T(8,128)}, s32[]{:T(128)}) while(%t), condition=%condition, body=%body
  ROOT %y = f32[8,64]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


def test_turns_are_read_from_the_condition():
    (found,) = Program(TPU_LOOP).collectives
    assert (found.turns, found.exact, found.source) == (36, True, "jit(step)/psum")
    assert found.devices == 8  # half of x, all of y
    assert found.received == 2 * 8 * 64 * 4 * 7 / 8


def test_turns_that_are_not_constant_are_not_guessed():
    unknown = TPU_LOOP.replace("%end = s32[]{:T(128)} constant(36)", "%end = s32[] parameter(1)")
    (found,) = Program(unknown, dynamic_turns=2.5).collectives
    assert (found.turns, found.exact) == (2.5, False)
    changing = TPU_LOOP.replace("tuple(%next, %y, %n)", "tuple(%next, %y, %next)")
    assert not Program(changing).exact


ASYNCHRONOUS = """\
HloModule jit_step, num_partitions=4

%start (p: bf16[4,64]) -> (bf16[4,64], bf16[8,64]) {
  %p = bf16[4,64]{1,0} parameter(0)
  %g = bf16[8,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %c = (bf16[4,64]{1,0}, bf16[8,64]{1,0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[4,64]) -> bf16[8,64] {
  %p = bf16[4,64]{1,0} parameter(0)
  %g = bf16[8,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %c = bf16[8,64]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1 (p: f32[8,64]) -> f32[2,64] {
  %p = f32[8,64]{1,0} parameter(0)
  %r = f32[8,64]{1,0} all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%sum
  ROOT %s = f32[2,64]{1,0} dynamic-slice(%r, %p), dynamic_slice_sizes={2,64}
}

ENTRY %main (x: bf16[4,64], y: f32[8,64]) -> bf16[8,64] {
  %x = bf16[4,64]{1,0} parameter(0)
  %y = f32[8,64]{1,0} parameter(1)
  %a = (bf16[4,64]{1,0}, bf16[8,64]{1,0}) fusion(%x), kind=kCustom, calls=%start
  %s = f32[2,64]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  %d = (bf16[4,64]{1,0}, bf16[8,64]{1,0}) all-gather-start(%x), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %b = bf16[8,64]{1,0} fusion(%x), kind=kCustom, calls=%done
}
"""


def test_an_asynchronous_collective_counts_once():
    gathered, scattered, begun = Program(ASYNCHRONOUS).collectives
    assert (gathered.kind, gathered.devices, gathered.received) == ("all-gather", 2, 8 * 64 * 2 / 2)
    assert (scattered.kind, scattered.received) == ("reduce-scatter", 8 * 64 * 4 * 3 / 4)
    assert (begun.kind, begun.array) == ("all-gather", Array("bf16", (8, 64)))
    assert [c.overlaps for c in (gathered, scattered, begun)] == [True, False, True]


PRODUCT = "  %w{0} = f32[8,8]{{1,0}} dot(%y, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}\n"


def test_what_is_computed_until_a_collective_ends_is_counted():
    """Three products of 8 x 64 by 64 x 8 until either of the asynchronous ones does, not the same three."""
    before, _, after = ASYNCHRONOUS.partition("  ROOT %b")
    ended = "  %e = bf16[8,64]{1,0} all-gather-done(%d)\n"
    first, last = "".join(map(PRODUCT.format, (1, 2))), PRODUCT.format(3)
    text = before.replace("  %d =", PRODUCT.format(0) + "  %d =")
    text += first + "  ROOT %b" + after.replace("\n}", "\n" + last + ended + "}", 1)
    gathered, scattered, begun = Program(text).collectives
    product = 2 * 8 * 8 * 64
    assert [c.meanwhile for c in (gathered, scattered, begun)] == [3 * product, 0, 3 * product]


LOOP = """\
HloModule m

%body (t: (f32[4,64])) -> (f32[4,64]) {
  %t = (f32[4,64]{1,0}) parameter(0)
  %x = f32[4,64]{1,0} get-tuple-element(%t), index=0
  %s = (f32[4,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,2]<=[2], dimensions={0}
  %w = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %e = f32[8,64]{1,0} all-gather-done(%s)
  ROOT %r = (f32[4,64]{1,0}) tuple(%x)
}

ENTRY %main (x: f32[4,64]) -> (f32[4,64]) {
  %x = f32[4,64]{1,0} parameter(0)
  %t = (f32[4,64]{1,0}) tuple(%x)
  ROOT %l = (f32[4,64]{1,0}) while(%t), condition=%any, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # fmt: skip


def test_in_a_loop_it_is_counted_for_one_turn_and_summed_over_all():
    from gqa_scaling.sweep.compile import summary

    (gathered,) = Program(LOOP).collectives
    assert (gathered.turns, gathered.meanwhile) == (5, 2 * 4 * 4 * 64)
    (row,) = summary(Program(LOOP))
    assert (row["times"], row["meanwhile"]) == (5, 5 * 2 * 4 * 4 * 64)


SLICES = """\
HloModule m

ENTRY %main (x: f32[8,64]) -> f32[8,64] {
  %x = f32[8,64]{1,0} parameter(0)
  %a = token[] after-all()
  %s = (f32[8,64]{1,0:T(8,128)}, u32[], token[]) send(%x, %a), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %r = (f32[8,64]{1,0:T(8,128)}, u32[], token[]) recv(%a), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  ROOT %g = f32[8,64]{1,0} get-tuple-element(%r), index=0
}
"""


def test_what_comes_from_other_slices():
    (found,) = Program(SLICES).collectives
    assert (found.kind, found.received, found.devices) == ("between-slices", 8 * 64 * 4, 0)


CONVOLUTION = """\
HloModule m

ENTRY %main (x: {x}, y: {y}) -> {out} {{
  %x = {x} parameter(0)
  %y = {y} parameter(1)
  ROOT %c = {out} convolution(%x, %y), {how}
}}
"""


@pytest.mark.parametrize(
    ("x", "y", "out", "how", "flops"),
    [
        ("bf16[32,64]", "bf16[64,16]", "bf16[32,16]", "dim_labels=bf_io->bf", 2 * 32 * 64 * 16),
        (  # a batch of 4 products, as a convolution that meets each element once
            "bf16[4,32,64]", "bf16[4,16,64]", "bf16[4,32,16]",
            "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf", 2 * 4 * 32 * 64 * 16,
        ),
        (  # 5 places, 3 wide, padded by 1 on both sides: two meet the padding
            "f32[1,5,8]", "f32[3,8,2]", "f32[1,5,2]",
            "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * 8 * 2 * (5 * 3 - 2),
        ),
    ],
)  # fmt: skip
def test_products_written_as_convolutions(x, y, out, how, flops):
    assert Program(CONVOLUTION.format(x=x, y=y, out=out, how=how)).flops == flops


def test_kernels_are_told():
    call = 'ROOT %k = f32[2]{0} custom-call(%x), custom_call_target="tpu_custom_call"'
    text = f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  %x = f32[2]{{0}} parameter(0)\n  {call}\n}}\n"
    assert Program(text).kernels == 1


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("f32", 24), ("bf16", 12), ("pred", 6), ("s4", 3), ("f8e4m3fn", 6), ("c64", 48)],
)
def test_bytes_of_an_array(dtype, size):
    assert Array(dtype, (2, 3)).bytes == size


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        Program("nothing")


def test_a_kernel_whose_attributes_take_several_lines():
    """As Pallas writes them for TPUs: the lines begin with what looks like an end."""
    program = Program(
        "HloModule m, num_partitions=2\n\nENTRY %main (x: f32[4,4]) -> f32[4,4] {\n"
        "  %x = f32[4,4]{1,0} parameter(0)\n"
        '  %k = f32[4,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        "frontend_attributes={kernel_metadata={\n"
        '"xprof_metadata":"{\\"block_q\\": 1024 = 1024}"\n'
        '}}, metadata={op_name="attend"}\n'
        "  ROOT %y = f32[4,4]{1,0} dot(%k, %x), lhs_contracting_dims={1}, "
        "rhs_contracting_dims={0}\n}\n"
    )
    assert program.kernels == 1
    assert program.flops == 2 * 4 * 4 * 4
