// How a batch's attention is divided into work, and where its keys and values live. Built once per batch, read by every
// layer; its address is stable, so a recorded graph finds the batch of the moment in it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace caduceus {

constexpr int kBlock = 16;     // keys in a block, the smallest page
constexpr int kKeyTile = 64;   // keys folded at a time, tiles aligned to position 0: part of what the bits are
constexpr int kChunk = 32;     // keys in one step of P V; slots of a started chunk hold values or zeros

// Queries [first_token, first_token + num_tokens) of a task against keys [key_begin, key_end) of one sequence.
struct AttentionPhase {
  int32_t first_token, num_tokens;  // relative to the task
  int32_t sequence, key_begin, key_end;
};

// A block of queries, walked through its phases in order: the keys its sequences share first, then each one's own.
struct AttentionTask {
  int32_t first_token, num_tokens;
  int32_t first_phase, num_phases;
  int64_t cost;
};

// Up to 16 tokens whose keys go to neighbouring slots of one block.
struct KeyRun {
  int32_t first_token, num_tokens;
  int32_t page, slot;
  int32_t num_zeros;  // slots behind the run that were never written, up to the end of their chunk
};

class AttentionPlan {
 public:
  // cu_seqlens [S+1], context_lens [S], positions [T]; block_tables [S, width], or null: sequence after sequence in
  // pages of their own, from 0 up. Throws std::invalid_argument.
  void build(const int32_t* cu_seqlens, const int32_t* context_lens, const int32_t* positions, int64_t num_sequences,
             const int32_t* block_tables, int64_t width, int64_t page_size);

  // The plan of some of `kv`'s rows as queries, [begins[i], ends[i]) each within one sequence, in the order of the rows;
  // they see the keys that they see in `kv`, in its pages. Throws std::invalid_argument.
  void build_segments(const AttentionPlan& kv, const int32_t* begins, const int32_t* ends, int64_t num_segments);

  const int32_t* pages(int sequence) const { return pages_.data() + first_page_[sequence]; }
  int64_t num_tokens() const { return int64_t(positions.size()); }

  int64_t page_size = kBlock;
  int64_t num_sequences = 0;
  int64_t num_pages = 0;      // one more than the largest page in use
  int64_t num_positions = 0;  // one more than the largest position
  int64_t version = 0;        // counts builds
  int64_t kv_version = 0;     // that of the keys' plan when this one was built on it
  std::vector<int32_t> positions;   // [T] for RoPE
  std::vector<int32_t> last_key;    // [T] the last key a query sees
  std::vector<int32_t> cu_seqlens;  // [S+1]; for a plan of segments, where each of them starts
  std::vector<int32_t> query_starts;  // [S+1] where the queries of each sequence of the keys' plan start
  std::vector<AttentionTask> tasks;
  std::vector<AttentionPhase> phases;
  std::vector<KeyRun> runs;

 private:
  void clear(int64_t sequences, int64_t size);
  void add_pages(int64_t sequence, int64_t context, const int32_t* table, int64_t width);
  void add_runs(int64_t sequence, int64_t context);
  void add_tasks();
  int64_t shared_keys(int64_t a, int64_t b, int64_t at_most) const;

  std::vector<int32_t> pages_;
  std::vector<int64_t> first_page_;  // [S+1]
};

// Memory of this thread, at least `bytes` long and 64-byte aligned, valid until the thread's next call. It only grows.
void* scratch(size_t bytes);

}  // namespace caduceus
