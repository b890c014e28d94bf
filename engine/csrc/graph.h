// Recording and replaying a forward: what a CUDA graph is on a GPU, this is on a CPU. While a graph records, every
// kernel call is noted down with its pointers instead of run; replay() runs them again in order, for any number of
// rows up to the recorded one. The arithmetic is the kernels' own, so a replay changes no bit.
#pragma once
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace caduceus {

class Graph {
 public:
  void begin();  // throws std::logic_error if another graph records on this thread, or if this one is replaying
  void end();
  void replay(int64_t rows);  // what an op throws ends the replay and goes on to the caller
  size_t size() const { return ops_.size(); }
  static Graph* recording();
  void add(std::function<void(int64_t)> op) { ops_.push_back(std::move(op)); }

 private:
  std::vector<std::function<void(int64_t)>> ops_;
  int replaying_ = 0;  // an op may be a call back to Python, and that may do anything
};

// Every binding of a forward kernel goes through here: run now on `rows` rows, or record.
template <class F>
void launch(int64_t rows, F&& op) {
  if (Graph* graph = Graph::recording())
    graph->add(std::forward<F>(op));
  else
    op(rows);
}

}  // namespace caduceus
