// The extension module engine._C. Arguments are raw addresses and sizes; torch's headers are not needed, so one build
// serves every torch version. The Python side of each op checks shapes, dtypes and contiguity before it calls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

  // ---- attention ----

  // ---- rms_norm, swiglu, embedding ----

  // ---- token_logprob, sample_token ----

  // ---- adamw ----
}
