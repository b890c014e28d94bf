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
  // types: of queries and of pages; shape: T, H, K, Dh, page size, window, rows and keys of a tile, keys of a split
  m.def("attention_decode",
        [](Address q, Address keys, Address values, Address items, Address counts, Address turns, Address parts,
           Address tables, Address last_keys, Address out, Address sums, Address softmaxes, std::array<int, 2> types,
           std::array<int64_t, 9> shape, float factor, bool tree_sums, bool has_turns, Address stream) {
          const auto [tokens, heads, kv_heads, dim, page_size, window, rows_of_tile, keys_of_tile, split] = shape;
          attention_decode({at(q), at(keys), at(values), at<int32_t>(items), at<int32_t>(counts), at<int32_t>(turns),
                            at<int32_t>(parts), at<int32_t>(tables), at<int32_t>(last_keys), at(out), at<float>(sums),
                            at<float>(softmaxes), CudaType(types[0]), CudaType(types[1]), tokens, heads, kv_heads, dim,
                            page_size, window, rows_of_tile, keys_of_tile, split, factor, tree_sums, has_turns},
                           at(stream));
        },
        py::call_guard<py::gil_scoped_release>());
}
