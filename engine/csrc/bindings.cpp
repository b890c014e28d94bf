// The extension module engine._C. Arguments are raw addresses and sizes; torch's headers are not needed, so one build
// serves every torch version. The Python side of each op checks shapes, dtypes and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/attention_plan.h"
#include "cpu/hash.h"
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

using Shape = std::array<int64_t, 4>;                // H, K, Dh, window
using Rows = std::tuple<Address, int64_t, int64_t>;  // address, row size, rows

static AttentionArguments attention_arguments(const AttentionPlan* plan, const AttentionPlan* kv_plan, int dtype,
                                              const Shape& shape, float scale, float eps, const Rows& q, const Rows& kv,
                                              Address rope, int64_t rope_positions, Address q_norm, Address k_norm,
                                              Address out, Address lse) {
  const auto [q_at, q_row_size, q_rows] = q;
  const auto [kv_at, kv_row_size, kv_rows] = kv;
  return {plan, kv_plan, DType(dtype), shape[0], shape[1], shape[2], shape[3], scale, eps, at(q_at), q_row_size,
          at(kv_at), kv_row_size, kv_rows, at<float>(rope), rope_positions, nullptr, nullptr, kv_plan->num_pages,
          at(q_norm), at(k_norm), at(out), at<float>(lse)};
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
      // Borrows the function, which the Python side keeps: a reference held here would be one that the garbage
      // collector cannot see, and a function that knows its graph's owner would keep the owner for ever.
      .def("host_call", [](Graph& graph, py::handle function) {
        if (Graph::recording() != &graph) throw std::logic_error("this graph is not recording");
        graph.add([borrowed = function.ptr()](int64_t rows) {
          py::gil_scoped_acquire gil;
          py::reinterpret_borrow<py::object>(borrowed)(rows);
        });
      })
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
      .def("build_segments", [](AttentionPlan& plan, const AttentionPlan& kv, Address begins, Address ends,
                                int64_t num_segments) {
        plan.build_segments(kv, at<int32_t>(begins), at<int32_t>(ends), num_segments);
      })
      .def_readonly("num_pages", &AttentionPlan::num_pages)
      .def_readonly("version", &AttentionPlan::version);
  m.def("attention_forward",
        [](const AttentionPlan* plan, const AttentionPlan* kv_plan, int dtype, Shape shape, float scale, float eps,
           Rows q, Rows kv, Address rope, int64_t rope_positions, Address q_norm, Address k_norm, Address out,
           Address lse, Address keys, Address values, int64_t num_pages) {
          AttentionArguments args = attention_arguments(plan, kv_plan, dtype, shape, scale, eps, q, kv, rope,
                                                        rope_positions, q_norm, k_norm, out, lse);
          args.keys = at(keys), args.values = at(values), args.num_pages = num_pages;
          launch(std::get<2>(q), [args](int64_t now) {
            check_attention(args, now);
            attention_forward(args);
          });
        },
        NoGil());
  m.def("attention_backward",
        [](const AttentionPlan* plan, const AttentionPlan* kv_plan, int dtype, Shape shape, float scale, float eps,
           Rows q, Rows kv, Address rope, int64_t rope_positions, Address q_norm, Address k_norm, Address out,
           Address lse, Address d_out, Rows d_q, Rows d_kv, Address d_q_norm, Address d_k_norm) {
          const AttentionArguments args = attention_arguments(plan, kv_plan, dtype, shape, scale, eps, q, kv, rope,
                                                              rope_positions, q_norm, k_norm, out, lse);
          check_attention(args, std::get<2>(q));
          attention_backward(args, {at(d_out), at(std::get<0>(d_q)), std::get<1>(d_q), at(std::get<0>(d_kv)),
                                    std::get<1>(d_kv), at<float>(d_q_norm), at<float>(d_k_norm)});
        },
        NoGil());

  // ---- rms_norm, swiglu, embedding ----
  m.def("rms_norm", [](int dtype, Address x, Address delta, Address weight, Address sum, Address out, Address rstd,
                       int64_t rows, int64_t width, float eps) {
    launch(rows, [=](int64_t n) {
      rms_norm(dtype, at(x), at(delta), at(weight), at(sum), at(out), at<float>(rstd), n, width, eps);
    });
  }, NoGil());
  m.def("rms_norm_backward", [](int dtype, Address dy, Address d_sum, Address x, Address weight, Address rstd,
                                Address dx, Address weight_grad, int64_t rows, int64_t width) {
    rms_norm_backward(dtype, at(dy), at(d_sum), at(x), at(weight), at<float>(rstd), at(dx), at<float>(weight_grad),
                      rows, width);
  }, NoGil());
  m.def("swiglu", [](int dtype, Address gate_up, Address out, int64_t rows, int64_t width) {
    launch(rows, [=](int64_t n) { swiglu(dtype, at(gate_up), at(out), n, width); });
  }, NoGil());
  m.def("swiglu_backward", [](int dtype, Address dy, Address gate_up, Address d_gate_up, int64_t rows, int64_t width) {
    swiglu_backward(dtype, at(dy), at(gate_up), at(d_gate_up), rows, width);
  }, NoGil());
  m.attr("WHOLE_TABLE") = kWholeTable;
  m.def("embedding", [](int dtype, Address tokens, Address weight, bool packed, Address out, int64_t rows,
                        int64_t vocab, int64_t width, int64_t first_row) {
    launch(rows, [=](int64_t n) {
      embedding(dtype, at<int32_t>(tokens), at(weight), packed, at(out), n, vocab, width, first_row);
    });
  }, NoGil());
  m.def("embedding_backward", [](int dtype, Address tokens, Address dy, Address weight_grad, int64_t rows,
                                 int64_t vocab, int64_t width, int64_t first_row) {
    embedding_backward(dtype, at<int32_t>(tokens), at(dy), at<float>(weight_grad), rows, vocab, width, first_row);
  }, NoGil());

  // ---- token_logprob, sample_token ----
  m.def("logits_logprob", [](Address logits, Address targets, Address inv_temperature, Address logprobs,
                             Address entropy, Address stats, int64_t rows, int64_t vocab, int64_t count) {
    launch(rows, [=](int64_t n) {
      logits_logprob(at<float>(logits), at<int32_t>(targets), at<float>(inv_temperature), at<float>(logprobs),
                     at<float>(entropy), at<float>(stats), n, vocab, count);
    });
  }, NoGil());
  m.def("logits_logprob_backward", [](int dtype, Address logits, Address targets, Address inv_temperature,
                                      Address stats, Address entropy, Address d_logprob, Address d_entropy,
                                      Address d_logits, int64_t rows, int64_t vocab) {
    logits_logprob_backward(dtype, at<float>(logits), at<int32_t>(targets), at<float>(inv_temperature),
                            at<float>(stats), at<float>(entropy), at<float>(d_logprob), at<float>(d_entropy),
                            at(d_logits), rows, vocab);
  }, NoGil());
  m.def("shard_statistics", [](Address logits, Address targets, Address inv_temperature, Address statistics,
                               int64_t rows, int64_t vocab, int64_t count) {
    shard_statistics(at<float>(logits), at<int32_t>(targets), at<float>(inv_temperature), at<double>(statistics), rows,
                     vocab, count);
  }, NoGil());
  m.def("fold_statistics", [](Address statistics, Address logprobs, Address entropy, Address stats, int64_t shards,
                              int64_t rows, int64_t count) {
    fold_statistics(at<double>(statistics), at<float>(logprobs), at<float>(entropy), at<float>(stats), shards, rows,
                    count);
  }, NoGil());
  m.def("hash_seed", [](int64_t seed, int64_t counter) {
    return int64_t(hash_seed(uint64_t(seed), uint64_t(counter)));
  });
  m.def("sample_token", [](Address logits, Address temperature, Address top_k, Address top_p, Address min_p,
                           Address seed, Address counter, Address tokens, Address logprobs, Address kept_mass,
                           int64_t rows, int64_t vocab) {
    launch(rows, [=](int64_t n) {
      sample_token(at<float>(logits), at<float>(temperature), at<int32_t>(top_k), at<float>(top_p), at<float>(min_p),
                   at<int64_t>(seed), at<int64_t>(counter), at<int32_t>(tokens), at<float>(logprobs),
                   at<float>(kept_mass), n, vocab);
    });
  }, NoGil());

  // ---- adamw ----
  m.def("adamw", [](int dtype, bool packed, double learning_rate, double beta1, double beta2, double eps,
                    double weight_decay, double grad_scale, int64_t step, Address grad, Address master,
                    Address exp_avg, Address exp_avg_sq, Address weight, int64_t rows, int64_t width) {
    adamw(dtype, packed, {learning_rate, beta1, beta2, eps, weight_decay, grad_scale, step}, at<float>(grad),
          at<float>(master), at<float>(exp_avg), at<float>(exp_avg_sq), at(weight), rows, width);
  }, NoGil());
  m.def("squared_norm", [](Address values, int64_t count) { return squared_norm(at<float>(values), count); }, NoGil());
}
