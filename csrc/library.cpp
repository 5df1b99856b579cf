// The operators' schemas, and the extension module for all that is not an operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/library.h>

#include "attention/bind.h"
#include "common/dispatch.h"
#include "hidden/bind.h"
#include "hidden/bind_rows.h"
#include "pairwise/bind.h"

STABLE_TORCH_LIBRARY(dsdistill, m) {
  // Each operator returns loss and gradients from one pass; gradients that are not asked for are empty.
  m.def(
      "attention_alignment(Tensor student_query, Tensor student_key, Tensor teacher_query, Tensor teacher_key, "
      "Tensor? mask, Tensor? segments, Tensor? rows, Tensor? row_weights, int divergence, float student_scale, "
      "float teacher_scale, bool causal, int window, bool mean, bool query_gradient, bool key_gradient) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "pairwise_alignment(Tensor student, Tensor teacher, Tensor? mask, Tensor? weights, int relation, bool mean, "
      "bool gradient) -> (Tensor, Tensor)");
  m.def(
      "hidden_alignment(Tensor student, Tensor teacher, Tensor? projection, Tensor? bias, Tensor? mask, "
      "Tensor? weights, int divergence, bool mean, bool student_gradient, bool projection_gradient, "
      "bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  // Only the memory-bound part, for rows that are already projected. GPUs run this.
  m.def(
      "hidden_rows(Tensor y, Tensor target, Tensor? bias, Tensor weights, Tensor factor, int divergence, "
      "Tensor(a!)? gradient, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dsdistill, CPU, m) {
  m.impl("attention_alignment", TORCH_BOX(&dsd::attention_alignment_cpu));
  m.impl("pairwise_alignment", TORCH_BOX(&dsd::pairwise_alignment_cpu));
  m.impl("hidden_alignment", TORCH_BOX(&dsd::hidden_alignment_cpu));
  m.impl("hidden_rows", TORCH_BOX(&dsd::hidden_rows_cpu));
}

#ifdef DSD_CUDA
STABLE_TORCH_LIBRARY_IMPL(dsdistill, CUDA, m) { m.impl("hidden_rows", TORCH_BOX(&dsd::hidden_rows_cuda)); }
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native operators of dsdistill, registered as torch.ops.dsdistill by importing this module.";
#ifdef DSD_CUDA  // the architectures for which setup.py compiles
  m.attr("cuda_architectures") = pybind11::make_tuple("sm_80", "sm_90");
#else
  m.attr("cuda_architectures") = pybind11::tuple();
#endif
  m.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (dsd::InstructionSet set : dsd::usable_instruction_sets()) names.push_back(dsd::name_of(set));
        return names;
      },
      "Instruction sets built here that this processor has, the plainest first.");
  m.def(
      "instruction_set", [] { return std::string(dsd::name_of(dsd::instruction_set())); },
      "The instruction set that runs: the best, or what the variable DSDISTILL_ISA names.");
  m.def("choose_instruction_set", &dsd::choose_instruction_set, pybind11::arg("name"),
        "Run another instruction set. Raises ValueError for one that is not usable here.");
  m.def("attention_workspace_bytes", &dsd::attention_workspace_bytes, pybind11::arg("tokens"),
        pybind11::arg("student_width"), pybind11::arg("teacher_width"),
        "Workspace of one thread of attention_alignment in float32, in bytes.");
  m.def("pairwise_workspace_bytes", &dsd::pairwise_workspace_bytes, pybind11::arg("tokens"),
        pybind11::arg("student_width"), pybind11::arg("teacher_width"),
        "Workspace of one thread of pairwise_alignment in float32, in bytes.");
  m.def("hidden_workspace_bytes", &dsd::hidden_workspace_bytes, pybind11::arg("student_width"),
        pybind11::arg("teacher_width"), "Workspace of one thread of hidden_alignment in float32, in bytes.");
}
