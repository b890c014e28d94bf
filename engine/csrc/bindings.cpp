// The extension module engine._C. Arguments are raw addresses and sizes; torch's headers are not needed, so one build
// serves every torch version. The Python side of each op checks shapes, dtypes and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention_plan.h"
#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/parallel.h"
#include "graph.h"

namespace py = pybind11;
using namespace caduceus;
using Address = uintptr_t;
using NoGil = py::call_guard<py::gil_scoped_release>;

template <class T = void>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of the engine";
  m.def("isa", [] { return std::string(isa_name(isa())); });
  m.def("best_isa", [] { return std::string(isa_name(best_isa())); });
  m.def("set_isa", [](const std::string& name) { set_isa(isa_from_name(name)); });
  m.def("num_threads", &num_threads);
  m.def("set_num_threads", &set_num_threads, NoGil());

  py::class_<Graph>(m, "Graph")
      .def(py::init<>())
      .def("begin", &Graph::begin)
      .def("end", &Graph::end)
      .def("replay", &Graph::replay, NoGil())
      .def("__len__", &Graph::size);

  // ---- linear ----
  m.def("pack_rows", [](Address storage, int dtype, int64_t width, int64_t row, int64_t rows, Address source,
                        int source_dtype, int64_t stride) {
    pack_rows(at(storage), DType(dtype), width, row, rows, at(source), DType(source_dtype), stride);
  }, NoGil());
  m.def("unpack_rows", [](Address storage, int dtype, int64_t width, int64_t row, int64_t rows, Address target,
                          int target_dtype, int64_t stride) {
    unpack_rows(at(storage), DType(dtype), width, row, rows, at(target), DType(target_dtype), stride);
  }, NoGil());
  m.def("advise_huge_pages", [](Address data, int64_t bytes) { advise_huge_pages(at(data), bytes); });
  m.def("linear", [](int64_t rows, int64_t columns, int64_t depth, int dtype, Address x, int64_t x_stride,
                     Address weight, Address bias, int bias_dtype, Address out, int out_dtype) {
    launch(rows, [=](int64_t tokens) {
      linear({tokens, columns, depth}, DType(dtype), at(x), x_stride, at(weight), at(bias), DType(bias_dtype), at(out),
             DType(out_dtype));
    });
  }, NoGil());
  m.def("linear_grad_input", [](int64_t rows, int64_t columns, int64_t depth, int dtype, Address dy, int64_t dy_stride,
                                Address weight, Address dx) {
    linear_grad_input({rows, columns, depth}, DType(dtype), at(dy), dy_stride, at(weight), at(dx));
  }, NoGil());
  m.def("linear_grad_weight", [](int64_t rows, int64_t columns, int64_t depth, int dtype, Address dy,
                                 int64_t dy_stride, Address x, int64_t x_stride, Address grad) {
    linear_grad_weight({rows, columns, depth}, DType(dtype), at(dy), dy_stride, at(x), x_stride, at<float>(grad));
  }, NoGil());
  m.def("linear_grad_bias", [](int64_t rows, int64_t columns, int dtype, Address dy, int64_t dy_stride, Address grad) {
    linear_grad_bias({rows, columns, 0}, DType(dtype), at(dy), dy_stride, at<float>(grad));
  }, NoGil());

  // ---- attention ----
  py::class_<AttentionPlan>(m, "AttentionPlan")
      .def(py::init<>())
      .def("build", [](AttentionPlan& plan, Address cu_seqlens, Address context_lens, Address positions,
                       int64_t num_sequences, Address block_tables, int64_t width, int64_t page_size) {
        plan.build(at<int32_t>(cu_seqlens), at<int32_t>(context_lens), at<int32_t>(positions), num_sequences,
                   at<int32_t>(block_tables), width, page_size);
      })
      .def_readonly("num_pages", &AttentionPlan::num_pages)
      .def_readonly("version", &AttentionPlan::version);
  m.def("attention_forward",
        [](const AttentionPlan* plan, int dtype, int64_t rows, std::array<int64_t, 4> shape, float scale, float eps,
           Address qkv, Address rope, int64_t rope_positions, Address keys, Address values, int64_t num_pages,
           Address q_norm, Address k_norm, Address out, Address lse) {
          AttentionArguments args{plan, DType(dtype), shape[0], shape[1], shape[2], shape[3], scale, eps,
                                  at(qkv), at<float>(rope), rope_positions, at(keys), at(values), num_pages,
                                  at(q_norm), at(k_norm), at(out), at<float>(lse)};
          launch(rows, [args](int64_t now) {
            check_attention(args, now);
            attention_forward(args);
          });
        },
        NoGil());

  // ---- rms_norm, swiglu, embedding ----

  // ---- token_logprob, sample_token ----

  // ---- adamw ----
}
