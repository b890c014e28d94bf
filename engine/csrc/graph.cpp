#include "graph.h"

#include <stdexcept>

namespace caduceus {
namespace {
thread_local Graph* current = nullptr;
}

Graph* Graph::recording() { return current; }

void Graph::begin() {
  if (current) throw std::logic_error("a graph is already recording on this thread");
  ops_.clear();
  current = this;
}

void Graph::end() {
  if (current != this) throw std::logic_error("this graph is not recording");
  current = nullptr;
}

}  // namespace caduceus
