#include "attention_plan.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "common.h"

namespace caduceus {
namespace {

constexpr int64_t kTaskTokens = 32;  // queries in a task: enough to pay for reading a key tile
constexpr int64_t kGroupTokens = 4;  // sequences with at most this many queries may share a task

std::string starts_of(const std::vector<int32_t>& cu_seqlens) {
  std::string text;
  for (size_t s = 0; s < cu_seqlens.size(); s++) {
    if (s == 8 && cu_seqlens.size() > 9) return text + ", ...";
    text += (s ? ", " : "") + std::to_string(cu_seqlens[s]);
  }
  return text;
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("AttentionPlan.build: " + what); }

}  // namespace

void AttentionPlan::build(const int32_t* starts, const int32_t* context_lens, const int32_t* rope_positions,
                          int64_t sequences, const int32_t* block_tables, int64_t width, int64_t size) {
  if (size < kBlock || size % kBlock)
    refuse("page_size is " + std::to_string(size) + "; it must be a multiple of 16");
  if (sequences > 0 && starts[0] != 0) refuse("cu_seqlens must start with 0");
  clear(sequences, size);
  cu_seqlens.assign(starts, starts + sequences + 1);
  const int64_t tokens = sequences ? starts[sequences] : 0;
  positions.assign(rope_positions, rope_positions + tokens);
  for (int32_t position : positions) {
    if (position < 0) refuse("a position is negative");
    num_positions = std::max<int64_t>(num_positions, position + 1);
  }
  last_key.resize(tokens);
  for (int64_t s = 0; s < sequences; s++) {
    const int64_t length = starts[s + 1] - starts[s], context = context_lens[s];
    if (length < 0 || context < length)
      refuse("sequence " + std::to_string(s) + " has " + std::to_string(length) + " rows and a context of " +
             std::to_string(context) + " keys; rows must be 0 or more and the context at least as many");
    for (int64_t i = 0; i < length; i++) last_key[starts[s] + i] = int32_t(context - length + i);
    add_pages(s, context, block_tables ? block_tables + s * width : nullptr, width);
    add_runs(s, context);
  }
  query_starts = cu_seqlens;
  add_tasks();
}

void AttentionPlan::build_segments(const AttentionPlan& kv, const int32_t* begins, const int32_t* ends,
                                   int64_t segments) {
  clear(segments, kv.page_size);
  kv_version = kv.version;
  num_pages = kv.num_pages, num_positions = kv.num_positions;
  cu_seqlens.assign(1, 0), query_starts.assign(1, 0);
  positions.clear(), last_key.clear();
  int64_t s = 0, before = 0;
  for (int64_t i = 0; i < segments; i++) {
    const int64_t begin = begins[i], end = ends[i];
    if (begin < before || end <= begin)
      refuse("segment " + std::to_string(i) + " is rows " + std::to_string(begin) + " to " + std::to_string(end) +
             "; it must have a row and begin at or after row " + std::to_string(before));
    while (s < kv.num_sequences && begin >= kv.cu_seqlens[s + 1]) {
      query_starts.push_back(cu_seqlens.back());
      s++;
    }
    if (s == kv.num_sequences || end > kv.cu_seqlens[s + 1])
      refuse("segment " + std::to_string(i) + " is rows " + std::to_string(begin) + " to " + std::to_string(end) +
             "; it must lie within one sequence, and they start at rows " + starts_of(kv.cu_seqlens));
    positions.insert(positions.end(), kv.positions.begin() + begin, kv.positions.begin() + end);
    last_key.insert(last_key.end(), kv.last_key.begin() + begin, kv.last_key.begin() + end);
    pages_.insert(pages_.end(), kv.pages(int(s)), kv.pages(int(s)) + last_key.back() / page_size + 1);
    first_page_.push_back(int64_t(pages_.size()));
    cu_seqlens.push_back(int32_t(positions.size()));
    before = end;
  }
  query_starts.resize(size_t(kv.num_sequences + 1), cu_seqlens.back());
  add_tasks();
}

void AttentionPlan::clear(int64_t sequences, int64_t size) {
  version++;
  page_size = size;
  num_sequences = sequences;
  num_pages = num_positions = 0;
  tasks.clear(), phases.clear(), runs.clear(), pages_.clear();
  first_page_.assign(1, 0);
}

void AttentionPlan::add_pages(int64_t s, int64_t context, const int32_t* table, int64_t width) {
  const int64_t count = ceil_div(context, page_size), length = cu_seqlens[s + 1] - cu_seqlens[s];
  if (!table && context != length)
    refuse("sequence " + std::to_string(s) + " has " + std::to_string(length) + " rows and a context of " +
           std::to_string(context) + " keys; earlier keys need block_tables");
  if (table && count > width)
    refuse("sequence " + std::to_string(s) + " has " + std::to_string(context) + " keys in pages of " +
           std::to_string(page_size) + ", more than its " + std::to_string(width) + " pages hold");
  for (int64_t i = 0; i < count; i++) {
    const int32_t page = table ? table[i] : int32_t(num_pages);
    if (page < 0) refuse("page " + std::to_string(page) + " of sequence " + std::to_string(s) + " is negative");
    pages_.push_back(page);
    num_pages = std::max<int64_t>(num_pages, page + 1);
  }
  first_page_.push_back(int64_t(pages_.size()));
}

void AttentionPlan::add_runs(int64_t s, int64_t context) {
  const int64_t begin = context - (cu_seqlens[s + 1] - cu_seqlens[s]);
  const int64_t unit = page_size % kChunk ? kBlock : kChunk;  // a chunk of P V is gathered block by block otherwise
  for (int64_t at = begin; at < context;) {
    const int64_t end = std::min(context, round_up(at + 1, kBlock));
    KeyRun run{int32_t(cu_seqlens[s] + at - begin), int32_t(end - at), pages(s)[at / page_size],
               int32_t(at % page_size), 0};
    // Whoever starts a chunk zeroes what it leaves of it: masked keys then add exact zeros, never stale NaNs.
    if (end == context && begin <= (context - 1) / unit * unit) run.num_zeros = int32_t(round_up(end, unit) - end);
    runs.push_back(run);
    at = end;
  }
}

// Whole tiles of keys that sequences a and b hold in the same pages and that all their queries see.
int64_t AttentionPlan::shared_keys(int64_t a, int64_t b, int64_t at_most) const {
  at_most = std::min<int64_t>({at_most, last_key[cu_seqlens[a]] + 1, last_key[cu_seqlens[b]] + 1});
  const int32_t *x = pages(int(a)), *y = pages(int(b));
  int64_t same = 0;
  while (same * page_size < at_most && x[same] == y[same]) same++;
  return std::min(same * page_size, at_most) / kKeyTile * kKeyTile;
}

void AttentionPlan::add_tasks() {
  auto length = [&](int64_t s) { return int64_t(cu_seqlens[s + 1] - cu_seqlens[s]); };
  for (int64_t s = 0; s < num_sequences;) {
    if (length(s) == 0) {
      s++;
      continue;
    }
    int64_t end = s + 1, shared = 0, rows = length(s);
    while (end < num_sequences && length(end) > 0 && length(end) <= kGroupTokens && length(s) <= kGroupTokens &&
           rows + length(end) <= kTaskTokens) {
      const int64_t count = end - s;
      const int64_t common = shared_keys(s, end, count == 1 ? INT64_MAX : shared);
      if (count * common <= (count - 1) * shared) break;  // the reads saved must grow
      shared = common;
      rows += length(end++);
    }
    const int64_t first = cu_seqlens[s];
    if (end > s + 1) {
      AttentionTask task{int32_t(first), int32_t(rows), int32_t(phases.size()), int32_t(end - s + 1), 0};
      phases.push_back({0, int32_t(rows), int32_t(s), 0, int32_t(shared)});
      task.cost = shared * (kTaskTokens / 2 + rows);
      for (int64_t i = s; i < end; i++) {
        const int32_t context = last_key[cu_seqlens[i + 1] - 1] + 1;
        phases.push_back({int32_t(cu_seqlens[i] - first), int32_t(length(i)), int32_t(i), int32_t(shared), context});
        task.cost += (context - shared) * (kTaskTokens / 2 + length(i));
      }
      tasks.push_back(task);
    } else {
      for (int64_t at = 0; at < rows; at += kTaskTokens) {
        const int64_t count = std::min(kTaskTokens, rows - at);
        const int32_t keys = last_key[first + at + count - 1] + 1;
        tasks.push_back({int32_t(first + at), int32_t(count), int32_t(phases.size()), 1,
                         keys * (kTaskTokens / 2 + count)});
        phases.push_back({0, int32_t(count), int32_t(s), 0, keys});
      }
    }
    s = end;
  }
  // The longest first, so that threads finish together.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
}

void* scratch(size_t bytes) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    size = size_t(round_up(int64_t(bytes), 4096));
    memory.reset();
    memory.reset(std::aligned_alloc(4096, size));
    if (!memory) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return memory.get();
}

}  // namespace caduceus
