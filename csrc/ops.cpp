// Every operator's schema. Implementations: cpu/*_op.cpp and cuda/*_op.cpp; the Python side: rtp_mm/ops.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(rtp_mm, m) {
  m.def(
      "vision_positions(Tensor grid_thw, Tensor angles, int cells, int windows, int frames, int merge_size, "
      "int window) -> (Tensor rope_hw, Tensor pos_thw, Tensor window_order, Tensor window_inverse, Tensor cu_windows, "
      "Tensor cu_frames, Tensor cos, Tensor sin)");
  m.def(
      "patch_embed(Tensor rows, Tensor weight, Tensor bias, float scale, Tensor? order, Tensor? pos, "
      "ScalarType out_dtype) -> Tensor");
  m.def(
      "resize_patchify(Tensor frames, int height, int width, int patch_size, int merge_size, str order, str filter, "
      "int temporal_patch_size) -> Tensor");
  m.def("pack_linear(Tensor weight, int parts) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor packed, int k, Tensor? scales, Tensor? sums, Tensor bias, str activation, "
      "int blocks, bool for_linear=False) -> Tensor");
  m.def(
      "packed_linear_add_(Tensor(a!) out, Tensor x, Tensor packed, int k, Tensor? scales, Tensor? sums, Tensor bias) "
      "-> ()");
  m.def("packed_patch_embed(Tensor[] rows, Tensor packed, Tensor bias, Tensor? order, Tensor? pos) -> Tensor");
  m.def("packed_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens, bool for_linear=False) -> Tensor");
  m.def(
      "add_norm_(Tensor(a!) x, Tensor? delta, Tensor weight, Tensor? bias, float eps, ScalarType out_dtype, "
      "bool for_linear=False) -> Tensor");
  m.def("rotate_qk_(Tensor(a!) qkv, Tensor cos, Tensor sin) -> ()");
  m.def("activate_(Tensor(a!) x, str activation) -> ()");
  m.def("silu_gate(Tensor gate_up) -> Tensor");
}
