"""What is read from the compiler's program, and from its refusal."""

from __future__ import annotations

import pytest

from numina_finetune.plan.compilation import held_lock, parameter_counts, parse_out_of_memory
from numina_finetune.plan.costs import AS_NEEDED, costs_of
from numina_finetune.plan.hlo import Array, arrays, module_of, parse
from numina_finetune.plan.memory import Arguments, memory_of
from tests.plan.hlo_texts import LOOP, MICRO_BATCHES, OUT_OF_MEMORY, WIDE_COUNTER

ROWS, HIDDEN = 256, 512
MIB = 2**20


def test_products_in_a_loop_count_for_each_turn() -> None:
    costs = costs_of(parse(LOOP))
    per_turn = 2 * ROWS * HIDDEN * HIDDEN
    outside = 2 * ROWS * 512 * 512  # the convolution: 256 features in, 512 rows and 512 columns out
    assert costs.module_flops["model.layers.*.mlp.up_proj"] == 4 * per_turn
    assert costs.matmul_flops == 4 * per_turn + outside
    assert costs.cycles == 4 * 1000
    assert costs.warnings == []


def test_a_counter_in_two_words_is_understood() -> None:
    condition = WIDE_COUNTER
    head, rest = LOOP.split("%condition.1 (carry.2", 1)
    narrow = LOOP.replace("%condition.1 (carry.2" + rest.split("\n}\n", 1)[0] + "\n}\n", condition)
    assert narrow != LOOP and head
    assert costs_of(parse(narrow)).cycles == 28 * 1000


def test_a_loop_without_a_visible_end_is_told() -> None:
    endless = LOOP.replace("%limit.1 = s32[]{:T(128)} constant(4)", "%limit.1 = s32[]{:T(128)} add(%turn.2, %turn.2)")
    costs = costs_of(parse(endless))
    assert costs.cycles == 1000
    assert any("loop.1" in warning for warning in costs.warnings)


def test_a_loop_over_what_unbalanced_routing_sends_is_left_out_and_told() -> None:
    endless = LOOP.replace("%limit.1 = s32[]{:T(128)} constant(4)", "%limit.1 = s32[]{:T(128)} add(%turn.2, %turn.2)")
    as_needed = endless.replace("body=%body.1\n", f'body=%body.1, metadata={{op_name="jit(f)/{AS_NEEDED}/while"}}\n')
    assert as_needed != endless
    costs = costs_of(parse(as_needed))
    assert costs.cycles == 0
    assert ["balanced routing" in warning for warning in costs.warnings] == [True]


def test_the_compilers_own_trip_count_is_believed() -> None:
    noted = LOOP.replace("body=%body.1\n", 'body=%body.1, backend_config={"known_trip_count":{"n":"7"}}\n')
    assert costs_of(parse(noted)).cycles == 7 * 1000


def test_collectives_are_counted_by_kind() -> None:
    costs = costs_of(parse(LOOP))
    assert costs.collective_count == {"all-gather": 1, "all-reduce": 1}
    assert costs.collective_bytes["all-gather"] == 4 * HIDDEN * HIDDEN * 2  # what comes out
    assert costs.collective_bytes["all-reduce"] == 64 * HIDDEN * 4  # what goes in


def test_memory_is_sorted_by_what_it_is_for() -> None:
    arguments = Arguments(["embed_tokens.weight", "input_ids"], ["weights", "batch"], [(512, 512), (256, 512)])
    memory = memory_of(parse(LOOP), arguments)
    kinds = memory.by_kind
    assert kinds["weights"] == 64 * HIDDEN * 4
    assert kinds["batch"] == ROWS * HIDDEN * 4
    assert kinds["collectives"] == 4 * HIDDEN * HIDDEN * 2
    assert kinds["saved activations"] >= ROWS * HIDDEN * 2
    largest = memory.allocations[0]
    assert (largest.bytes, largest.kind, largest.module) == (2 * MIB, "collectives", "model.layers.7")


def test_what_a_micro_batch_saves_is_told_from_what_it_adds_up() -> None:
    arguments = Arguments(["model.layers.[0::1].up_proj.weight"], ["weights"], [(64, 512)])
    kinds = memory_of(parse(MICRO_BATCHES), arguments).by_kind
    assert kinds["saved activations"] == 2 * ROWS * HIDDEN * 2  # input and output of the layer
    assert kinds["gradients"] >= 64 * HIDDEN * 4


def test_what_is_saved_of_square_layers_is_no_gradient_of_their_stack() -> None:
    """Two layers' inputs of 256 tokens have the size of two square weights, which are never whole on a chip."""
    arguments = Arguments(["model.layers.[0::1].o_proj.weight"], ["weights"], [(256, 512)])
    kinds = memory_of(parse(MICRO_BATCHES), arguments).by_kind
    assert kinds["saved activations"] == 2 * ROWS * HIDDEN * 2  # input and output of the layer


def test_what_replaces_an_argument_takes_no_memory_of_its_own() -> None:
    arguments = Arguments(["w", "ids"], ["weights", "batch"])
    aliased = memory_of(parse(LOOP), arguments)
    apart = memory_of(parse(LOOP.replace(", input_output_alias={ {0}: (0, {}, may-alias) }", "")), arguments)
    assert sum(one.bytes for one in apart.allocations) >= sum(one.bytes for one in aliased.allocations)


def test_small_dimensions_are_rounded_up_to_tiles() -> None:
    assert Array("f32", (8, 1), "{1,0:T(8,128)}").allocated == 8 * 128 * 4
    assert Array("f32", (8, 1), "{0,1:T(8,128)}").allocated == 8 * 128 * 4
    assert Array("bf16", (16, 256), "{1,0:T(8,128)(2,1)}").allocated == 16 * 256 * 2


def test_what_lies_on_the_core_is_not_main_memory() -> None:
    (near,) = arrays("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}")
    assert not near.in_hbm and near.bytes == 2048


@pytest.mark.parametrize(
    ("op_name", "module"),
    [
        ("module=model.layers.0.mlp;.17/aten__mm", "model.layers.0.mlp"),
        (
            "module=a;.1/loop/call.2/module=backward model.layers.*.self_attn.q_proj;.9/aten__mm",
            "backward model.layers.*.self_attn.q_proj",
        ),
        ("aten__add", ""),
        ("", ""),
    ],
)
def test_the_innermost_module_is_named(op_name: str, module: str) -> None:
    assert module_of(op_name) == module


def test_a_refusal_tells_use_limit_and_largest_allocations() -> None:
    found = parse_out_of_memory(OUT_OF_MEMORY)
    assert found is not None
    used, limit, largest = found
    assert used == int(49.87 * 2**30) and limit == int(15.75 * 2**30)
    assert largest[0].bytes == int(296.75 * MIB)
    assert (largest[0].module, largest[0].operation) == ("CausalLoss", "aten__einsum")
    assert (largest[1].shape, largest[1].operation) == ("f32[8,16,1024,1024]", "fusion.7")


def test_a_single_array_beyond_all_memory_is_a_lack_of_memory_too() -> None:
    found = parse_out_of_memory(
        "RESOURCE_EXHAUSTED: Allocation (size=34359738368) would exceed memory (size=17179869184) :: "
        "#allocation312 [shape = 'bf16[134217728,24]{1,0:T(8,128)(2,1)}', space=hbm, tag = 'output of fusion@{}']"
    )
    assert found is not None
    used, limit, (largest,) = found
    assert (used, limit, largest.shape) == (2**35, 2**34, "bf16[134217728,24]")


def test_another_refusal_is_no_lack_of_memory() -> None:
    assert parse_out_of_memory("INTERNAL: Mosaic failed to compile TPU kernel") is None


@pytest.mark.parametrize(
    ("message", "who"),
    [
        (
            "ABORTED: Internal error when accessing libtpu multi-process lockfile. "
            'Run "$ sudo rm /tmp/libtpu_lockfile".',
            "another process",
        ),
        ("The TPU is already in use by process with pid 4711. Not attempting to load libtpu.so", "process 4711"),
    ],
)
def test_a_held_lock_is_told_with_what_to_do(message: str, who: str) -> None:
    told = held_lock(message)
    assert told is not None and who in told and "wait until it ends" in told and "a machine without a TPU" in told
    assert held_lock("RESOURCE_EXHAUSTED: out of memory") is None


def test_a_token_meets_only_the_experts_it_is_sent_to() -> None:
    arguments = [
        {"name": "model.embed_tokens.weight", "kind": "weights", "shape": (10, 4)},
        {"name": "model.layers.0.mlp.experts.gate_up_proj", "kind": "weights", "shape": (8, 4, 4)},
        {"name": "model.norm.weight", "kind": "weights", "shape": (4,), "frozen": True},
        {"name": "model.embed_tokens.weight:exp_avg", "kind": "optimizer", "shape": (10, 4)},
    ]
    assert parameter_counts(arguments, {"num_experts_per_tok": 2, "num_local_experts": 8}) == (172, 76, 72 * 6 + 4 * 4)


def test_a_text_without_an_entry_is_refused() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule empty\n")
