# ruff: noqa: E501 -- the compiler writes an instruction into one line
"""Small programs in the compiler's notation, written for the tests."""

from __future__ import annotations

LOOP = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%add.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %sum.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

%body.1 (carry.1: (s32[], bf16[256,512], bf16[4,512,512], f32[4,64,512])) -> (s32[], bf16[256,512], bf16[4,512,512], f32[4,64,512]) {
  %carry.1 = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[4,512,512]{2,1,0:T(8,128)(2,1)}, f32[4,64,512]{2,1,0:T(8,128)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %hidden.1 = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%carry.1), index=1
  %stack.1 = bf16[4,512,512]{2,1,0:T(8,128)(2,1)} get-tuple-element(%carry.1), index=2
  %kept.1 = f32[4,64,512]{2,1,0:T(8,128)} get-tuple-element(%carry.1), index=3
  %one.1 = s32[]{:T(128)} constant(1)
  %row.1 = bf16[512,512]{1,0:T(8,128)(2,1)} dynamic-slice(%stack.1, %turn.1), dynamic_slice_sizes={1,512,512}
  %product.1 = bf16[256,512]{1,0:T(8,128)(2,1)} dot(%hidden.1, %row.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="module=model.layers.7;.2/loop/call.3/module=model.layers.*.mlp.up_proj;.12/aten__mm"}, backend_config={"estimated_cycles":"1000"}
  %next.1 = s32[]{:T(128)} add(%turn.1, %one.1)
  ROOT %made.1 = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[4,512,512]{2,1,0:T(8,128)(2,1)}, f32[4,64,512]{2,1,0:T(8,128)}) tuple(%next.1, %product.1, %stack.1, %kept.1)
}

%condition.1 (carry.2: (s32[], bf16[256,512], bf16[4,512,512], f32[4,64,512])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[4,512,512]{2,1,0:T(8,128)(2,1)}, f32[4,64,512]{2,1,0:T(8,128)}) parameter(0)
  %turn.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %limit.1 = s32[]{:T(128)} constant(4)
  ROOT %more.1 = pred[]{:T(512)} compare(%turn.2, %limit.1), direction=LT
}

ENTRY %main.1 (weight: f32[64,512], ids: s32[256,512]) -> (f32[64,512], f32[]) {
  %weight = f32[64,512]{1,0:T(8,128)} parameter(0)
  %ids = s32[256,512]{1,0:T(8,128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %start.1 = bf16[256,512]{1,0:T(8,128)(2,1)} convert(%ids), metadata={op_name="module=model.embed_tokens;.2/aten__embedding"}
  %cast.1 = bf16[64,512]{1,0:T(8,128)(2,1)} convert(%weight)
  %whole.1 = bf16[4,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%cast.1), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="module=model.layers.7;.2/aten__t"}
  %kept.2 = f32[4,64,512]{2,1,0:T(8,128)} broadcast(%zero.1), dimensions={}
  %given.1 = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[4,512,512]{2,1,0:T(8,128)(2,1)}, f32[4,64,512]{2,1,0:T(8,128)}) tuple(%zero.1, %start.1, %whole.1, %kept.2)
  %loop.1 = (s32[]{:T(128)}, bf16[256,512]{1,0:T(8,128)(2,1)}, bf16[4,512,512]{2,1,0:T(8,128)(2,1)}, f32[4,64,512]{2,1,0:T(8,128)}) while(%given.1), condition=%condition.1, body=%body.1
  %last.1 = bf16[256,512]{1,0:T(8,128)(2,1)} get-tuple-element(%loop.1), index=1
  %gradient.1 = f32[64,512]{1,0:T(8,128)} convolution(%last.1, %last.1), dim_labels=fb_io->bf, metadata={op_name="module=backward model.embed_tokens;.9/aten__mm"}
  %summed.1 = f32[64,512]{1,0:T(8,128)} all-reduce(%gradient.1), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add.1
  %loss.1 = f32[]{:T(128)} constant(0)
  ROOT %result.1 = (f32[64,512]{1,0:T(8,128)}, f32[]{:T(128)}) tuple(%summed.1, %loss.1)
}
"""
"""Four turns of one product, a gather before them, and an update that takes the weight's place."""

MICRO_BATCHES = """\
HloModule step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%body.1 (carry.1: (s32[], f32[64,512], f32[64,512])) -> (s32[], f32[64,512], f32[64,512]) {
  %carry.1 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) parameter(0)
  %turn.1 = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %weight.1 = f32[64,512]{1,0:T(8,128)} get-tuple-element(%carry.1), index=1
  %sum.1 = f32[64,512]{1,0:T(8,128)} get-tuple-element(%carry.1), index=2
  %one.1 = s32[]{:T(128)} constant(1)
  %hidden.1 = bf16[256,512]{1,0:T(8,128)(2,1)} dot(%weight.1, %weight.1), lhs_contracting_dims={0}, rhs_contracting_dims={0}, metadata={op_name="module=model.embed_tokens;.2/aten__mm"}
  %output.1 = bf16[256,512]{1,0:T(8,128)(2,1)} dot(%hidden.1, %weight.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="module=model.layers.7;.2/aten__mm"}
  %gradient.1 = f32[64,512]{1,0:T(8,128)} convolution(%output.1, %hidden.1), dim_labels=fb_io->bf, metadata={op_name="module=backward model.layers.7;.9/aten__mm"}
  %grown.1 = f32[64,512]{1,0:T(8,128)} add(%sum.1, %gradient.1)
  %next.1 = s32[]{:T(128)} add(%turn.1, %one.1)
  ROOT %made.1 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) tuple(%next.1, %weight.1, %grown.1)
}

%condition.1 (carry.2: (s32[], f32[64,512], f32[64,512])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) parameter(0)
  %turn.2 = s32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %limit.1 = s32[]{:T(128)} constant(4)
  ROOT %more.1 = pred[]{:T(512)} compare(%turn.2, %limit.1), direction=LT
}

ENTRY %main.1 (weight: f32[64,512]) -> (f32[64,512]) {
  %weight = f32[64,512]{1,0:T(8,128)} parameter(0)
  %zero.1 = s32[]{:T(128)} constant(0)
  %zeros.1 = f32[64,512]{1,0:T(8,128)} broadcast(%zero.1), dimensions={}
  %given.1 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) tuple(%zero.1, %weight, %zeros.1)
  %loop.1 = (s32[]{:T(128)}, f32[64,512]{1,0:T(8,128)}, f32[64,512]{1,0:T(8,128)}) while(%given.1), condition=%condition.1, body=%body.1
  %summed.1 = f32[64,512]{1,0:T(8,128)} get-tuple-element(%loop.1), index=2
  ROOT %result.1 = (f32[64,512]{1,0:T(8,128)}) tuple(%summed.1)
}
"""
"""A step in four micro-batches: way forward and way back are both in the loop's body."""

WIDE_COUNTER = """\
%condition.1 (carry.2: (u32[], u32[])) -> pred[] {
  %carry.2 = (u32[], u32[]) parameter(0)
  %low.1 = u32[] get-tuple-element(%carry.2), index=0
  %high.1 = u32[] get-tuple-element(%carry.2), index=1
  %zero.1 = s32[] constant(0)
  %zero.2 = u32[] constant(0)
  %limit.1 = u32[] constant(28)
  %signed.1 = s32[] bitcast-convert(%high.1)
  %below.1 = pred[] compare(%signed.1, %zero.1), direction=LT
  %level.1 = pred[] compare(%high.1, %zero.2), direction=EQ
  %less.1 = pred[] compare(%low.1, %limit.1), direction=LT
  %both.1 = pred[] and(%level.1, %less.1)
  ROOT %more.1 = pred[] or(%below.1, %both.1)
}
"""
"""A 64-bit counter, which a TPU holds as two words."""

OUT_OF_MEMORY = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 49.87G of 15.75G hbm. \
Exceeded hbm capacity by 34.12G.

Total hbm usage >= 50.12G:
    reserved        258.00M
    program          49.87G
    arguments            0B

Output size 0B; shares 0B with arguments.

  Largest program allocations in hbm:

  1. Size: 296.75M
     Operator: op_name="module=CausalLoss;.75/aten__einsum" source_file="functional.py" source_line=373
     Shape: bf16[151936,1024]{1,0:T(8,128)(2,1)}
     Unpadded size: 296.75M
     XLA label: all-reduce.336 = all-reduce(fusion.88), channel_id=529
     Allocation type: HLO temp
     ==========================

  2. Size: 64.00M
     Shape: f32[8,16,1024,1024]{3,2,1,0:T(8,128)}
     Unpadded size: 64.00M
     XLA label: fusion.7 = fusion(param.1)
     Allocation type: HLO temp
     ==========================
"""
