// The extension module engine._cuda. Arguments are raw device addresses, sizes and a stream's handle; neither torch's
// headers nor CUDA's are needed, and importing it starts nothing on a GPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "attention.h"

namespace py = pybind11;
using namespace caduceus;
using Address = uintptr_t;

template <class T = void>
static T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of the engine";
  m.attr("BFLOAT16") = int(CudaType::kBFloat16);
  m.attr("FLOAT16") = int(CudaType::kFloat16);
  m.attr("E4M3") = int(CudaType::kE4M3);
  // shape: H, K, Dh, page size, window; types: of queries and of pages
  m.def("attention_decode",
        [](Address q, Address keys, Address values, Address items, Address num_items, Address tables,
           Address last_keys, Address out, Address lse, Address partial_out, Address partial_stats,
           std::array<int, 2> types, std::array<int64_t, 5> shape, float scale, Address stream) {
          const auto [heads, kv_heads, dim, page_size, window] = shape;
          attention_decode({at(q), at(keys), at(values), at<int32_t>(items), at<int32_t>(num_items),
                            at<int32_t>(tables), at<int32_t>(last_keys), at(out), at<float>(lse),
                            at<float>(partial_out), at<float>(partial_stats), CudaType(types[0]), CudaType(types[1]),
                            heads, kv_heads, dim, page_size, window, scale},
                           at(stream));
        },
        py::call_guard<py::gil_scoped_release>());
}
