#include "scratch.h"

#include <new>

namespace caduceus {
namespace {

constexpr std::align_val_t kLine{64};

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { ::operator delete(data, kLine); }
};

thread_local Buffer buffers[int(Scratch::kCount)];

}  // namespace

void* scratch(Scratch what, size_t bytes) {
  Buffer& buffer = buffers[int(what)];
  if (bytes > buffer.bytes) {
    ::operator delete(buffer.data, kLine);
    buffer.data = nullptr, buffer.bytes = 0;
    buffer.data = ::operator new(bytes, kLine);
    buffer.bytes = bytes;
  }
  return buffer.data;
}

}  // namespace caduceus
