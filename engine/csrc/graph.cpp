#include "graph.h"

#include <stdexcept>

namespace caduceus {
namespace {
thread_local Graph* current = nullptr;
}

Graph* Graph::recording() { return current; }

void Graph::begin() {
  if (current) throw std::logic_error("a graph is already recording on this thread");
  if (replaying_) throw std::logic_error("a graph cannot record while it is replaying");
  ops_.clear();
  current = this;
}

void Graph::end() {
  if (current != this) throw std::logic_error("this graph is not recording");
  current = nullptr;
}

void Graph::replay(int64_t rows) {
  if (current) throw std::logic_error("a graph is recording on this thread; a replay cannot be part of it");
  struct Depth {
    int& depth;
    explicit Depth(int& d) : depth(d) { depth++; }
    ~Depth() { depth--; }
  } depth(replaying_);
  for (const auto& op : ops_) op(rows);
}

}  // namespace caduceus
