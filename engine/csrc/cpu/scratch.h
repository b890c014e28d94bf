// Working memory of the kernels: one set of buffers per thread, which only grow, so that a warm call allocates nothing.
#pragma once
#include <cstddef>

namespace caduceus {

enum class Scratch : int { kRows, kPanels, kSums, kCount };  // what a buffer is for: one live use of each per thread

// At least `bytes` bytes, 64-byte aligned, uninitialised; valid until the same thread asks for the same buffer again.
void* scratch(Scratch what, size_t bytes);

}  // namespace caduceus
