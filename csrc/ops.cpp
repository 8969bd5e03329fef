// The operations of the native libraries: their schemas, all in one place.
//
// A kernel stands in a file of its own and registers itself there (STABLE_TORCH_LIBRARY_IMPL): *.cpp in the CPU
// library, which also holds these schemas, *.cu in the CUDA library. Fakes and autograd are registered from Python.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(cram, m) {
  // The penalty of all modules and, already in the forward, its gradients: flat float32, module after module, empty
  // where not wanted. `hidden` are means [B, D_in] or, with a mask [B, T], tokens [B, T, D_in].
  m.def(
      "orthogonality_penalty(Tensor[] hidden, Tensor[] a, Tensor[] bt, Tensor[] bases, Tensor gamma, Tensor? mask, "
      "float scale, bool want_hidden, bool want_a, bool want_bt, bool want_gamma) "
      "-> (Tensor loss, Tensor dhidden, Tensor da, Tensor dbt, Tensor dgamma)");
  // Gates [L, S, E] of queries [S, D_q] and centroids [L, E, D_q]; members bool [S, E].
  m.def("native_centroid_gates(Tensor query, Tensor centroids, float sigma, Tensor? members) -> Tensor");
  // The expert layer with its base linear, gates [S, E] with S dividing T. `forward` drops and also returns Z's columns
  // from `first` on; `backward` returns what is not needed empty, `tail` being the first trained row.
  m.def(
      "packed_expert_lora(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor bt, Tensor owner, Tensor gates, "
      "float scale) -> Tensor");
  // The same for layers that read one x, with the same gates and scale; all have a bias or none.
  m.def(
      "packed_expert_lora_stack(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] a, Tensor[] bt, Tensor[] owners, "
      "Tensor gates, float scale) -> Tensor[]");
  m.def(
      "packed_expert_lora_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor bt, Tensor owner, "
      "Tensor gates, float scale, int first, int dropped, SymInt row_word, SymInt pair_word) -> (Tensor y, Tensor z)");
  m.def(
      "packed_expert_lora_backward(Tensor dy, Tensor? x, Tensor z, Tensor weight, Tensor a, Tensor bt, Tensor owner, "
      "Tensor gates, float scale, int tail, int dropped, SymInt row_word, SymInt pair_word, bool need_x, "
      "bool need_gates, bool need_a, bool need_b) -> (Tensor dx, Tensor dgates, Tensor da, Tensor db)");
}
