// Paged attention, forward. One walk for prefill, chunked prefill, decode and training (online softmax, arXiv
// 2112.05682, 2205.14135):
//
//   for every tile of 64 keys, aligned to position 0, in order
//     S = Q K^T                        one chain per score, along the head
//     m' = max(m, max S), P = 2^(c S - m'), l = l 2^(m - m') + sum P
//     O = O 2^(m - m') + P V           P rounded to the model's type, one chain per element, along the tile's keys
//   out = O / l
//
// Rows of a task are (token, query head) pairs that share one kv head, token-major. A row's arithmetic is the same
// whichever rows are computed with it: masked keys have P = 0, and blocks of keys no row of a tile needs are skipped,
// which equals adding zeros.
//
// Pages, per kv head:  keys   [page_size/16 blocks][Dh/pair][16 keys][pair]   panels of Q K^T (Dh padded to 32 in bf16)
//                      values [Dh/16][page_size/pair][16][pair]               panels of P V
#include "attention_tiles.inl"
#include "rope.inl"

// Rows computed together. With 64 keys a tile, all that 16 rows work on stays in a 48 KB cache at Dh = 64 (prefill of
// 1,024 tokens on one thread: 340 GFLOP/s, against 296 for 32 rows and 128 keys).
constexpr int kRows = 16;
constexpr float kNoScore = -1e30f;      // the running maximum before the first key
constexpr float kLog2E = 1.44269504088896341f;

template <class T>
struct Layout {
  explicit Layout(const AttentionArguments& args)
      : dim(int(args.head_dim)), depth(padded_dim<T>(dim)), page_size(args.plan->page_size),
        key_head(page_size * depth), value_head(page_size * dim), key_page(key_head * args.num_kv_heads),
        value_page(value_head * args.num_kv_heads) {}
  T* key_block(T* keys, int64_t page, int64_t head, int64_t slot) const {
    return keys + page * key_page + head * key_head + slot / kBlock * kBlock * depth;
  }
  T* value_pair(T* values, int64_t page, int64_t head, int64_t slot) const {  // of the first panel
    return values + page * value_page + head * value_head + slot / kPair<T> * 16 * kPair<T>;
  }
  int64_t value_panel() const { return page_size * 16; }

  int dim, depth;
  int64_t page_size, key_head, value_head, key_page, value_page;
};

template <class T>
SIMD_INLINE void write_value(const float* value, float* panels, int64_t, const Layout<T>& layout) {
  for (int d = 0; d < layout.dim; d += 16) store(panels + d / 16 * layout.value_panel(), load(value + d));
}
template <class T>
SIMD_INLINE void write_value(const bf16* value, bf16* panels, int64_t slot, const Layout<T>& layout) {
  for (int d = 0; d < layout.dim; d += 16) {
    u16x16 h;
    u32x16 line;
    bf16* at = panels + d / 16 * layout.value_panel();
    std::memcpy(&h, value + d, 32), std::memcpy(&line, at, 64);
    u32x16 word = __builtin_convertvector(h, u32x16);
    line = slot % 2 ? (line & 0xffffu) | word << 16 : (line & 0xffff0000u) | word;
    std::memcpy(at, &line, 64);
  }
}

// Norms, rotates and stores the keys of a run, and its values, for one kv head.
template <class T>
static void write_run(const AttentionArguments& args, const KeyRun& run, int64_t head) {
  const Layout<T> layout(args);
  T* block = layout.key_block(static_cast<T*>(args.keys), run.page, head, run.slot);
  const int words = layout.depth / kPair<T>;
  alignas(64) T key[kMaxHeadDim + 16] = {};
  for (int i = 0; i < run.num_tokens; i++) {
    const int64_t token = run.first_token + i, slot = run.slot + i;
    const T* x = static_cast<const T*>(args.kv) + token * args.kv_row_size + head * args.head_dim;
    norm_and_rotate(x, static_cast<const T*>(args.k_norm), args.eps,
                    args.rope + args.kv_plan->positions[token] * layout.dim, layout.dim, key);
    for (int w = 0; w < words; w++)
      std::memcpy(block + (w * kBlock + slot % kBlock) * kPair<T>, key + w * kPair<T>, 4);
    write_value(x + args.num_kv_heads * args.head_dim,
                layout.value_pair(static_cast<T*>(args.values), run.page, head, slot), slot, layout);
  }
  alignas(64) const T zero[kMaxHeadDim] = {};
  for (int i = 0; i < run.num_zeros; i++) {
    const int64_t slot = run.slot + run.num_tokens + i;
    write_value(zero, layout.value_pair(static_cast<T*>(args.values), run.page, head, slot), slot, layout);
  }
}

// A thread's working memory for one task, carved from scratch().
template <class T>
struct Workspace {
  Workspace(int64_t rows, const Layout<T>& layout) {
    const int64_t padded = rows + kRows;  // tiles may read, never write, rows past the last
    bytes = 0;
    carve(&queries, padded * layout.depth, nullptr);
    char* base = nullptr;
    auto all = [&] {
      bytes = 0;
      carve(&queries, padded * layout.depth, base);
      carve(&output, padded * layout.dim, base);
      carve(&sum, padded * 16, base);
      carve(&maximum, padded, base);
      carve(&low, padded, base);
      carve(&high, padded, base);
      carve(&scores, kRows * kKeyTile, base);
      carve(&probabilities, kRows * kKeyTile, base);
      carve(&product, kRows * layout.dim, base);
      carve(&values, kKeyTile * layout.dim, base);
    };
    all();
    base = static_cast<char*>(scratch(bytes));
    all();
  }
  template <class U>
  void carve(U** pointer, int64_t count, char* base) {
    *pointer = reinterpret_cast<U*>(base + bytes);
    bytes += size_t(round_up(count * int64_t(sizeof(U)), 64));
  }

  size_t bytes;
  T* queries;           // [rows][depth]
  float* output;        // [rows][dim]
  float* sum;           // [rows][16 lanes]
  float* maximum;       // [rows], in units of log2
  int32_t *low, *high;  // [rows] the keys a row sees: low <= key < high
  float* scores;        // [16][64]
  T* probabilities;     // [16][64]
  float* product;       // [16][dim]
  T* values;            // [2 chunks][dim/16][32/pair][16][pair], where a chunk is not in one piece
};

// Scores of `count` rows to probabilities, blocks [begin, end) of the tile at `tile`; rescale[r] = 2^(m - m').
template <class T>
SIMD_INLINE void softmax_rows(Workspace<T>& work, int64_t row, int count, int64_t tile, int begin, int end,
                              float scale, float* rescale) {
  const f32x16 hidden = splat(-std::numeric_limits<float>::infinity());
  alignas(64) float highest[kRows];
  for (int r = 0; r < count; r++) {
    float* scores = work.scores + r * kKeyTile;
    const int32_t low = work.low[row + r] - int32_t(tile), high = work.high[row + r] - int32_t(tile);
    f32x16 top = hidden;
    if (low <= begin * kBlock && high >= end * kBlock) {
      for (int b = begin; b < end; b++) top = max(load(scores + b * kBlock), top);
    } else {
      for (int b = begin; b < end; b++) {
        const i32x16 key = lane_numbers() + b * kBlock;
        f32x16 s = (key >= low) & (key < high) ? load(scores + b * kBlock) : hidden;
        store(scores + b * kBlock, s);
        top = max(s, top);
      }
    }
    highest[r] = maximum(top);
  }
  for (int r = count; r < kRows; r++) highest[r] = 0.f;
  alignas(64) float negative[kRows];
  for (int r = 0; r < count; r += 16) {
    f32x16 before = load(work.maximum + row + r), after = max(load(highest + r) * scale, before);
    store(rescale + r, exp2_of_nonpositive(before - after));
    store(negative + r, -after);
  }
  for (int r = 0; r < count; r++) {
    work.maximum[row + r] = -negative[r];
    const float* scores = work.scores + r * kKeyTile;
    T* p = work.probabilities + r * kKeyTile;
    const f32x16 shift = splat(negative[r]), factor = splat(scale);
    f32x16 total = splat(0.f);
    for (int b = begin; b < end; b++) {
      f32x16 e = exp2_of_nonpositive(fma(load(scores + b * kBlock), factor, shift));
      store_rounded(p + b * kBlock, e);
      total = total + e;
    }
    if (end % 2) store_rounded(p + end * kBlock, splat(0.f));
    float* sum = work.sum + (row + r) * 16;
    store(sum, fma(load(sum), splat(rescale[r]), total));
  }
}

template <class T>
static void attend_phase(const AttentionArguments& args, const Layout<T>& layout, Workspace<T>& work,
                         const AttentionPhase& phase, int64_t head) {
  const int64_t group = args.num_heads / args.num_kv_heads;
  const int64_t first = phase.first_token * group, last = first + phase.num_tokens * group;
  const int32_t* pages = args.plan->pages(phase.sequence);
  T *keys = static_cast<T*>(args.keys), *values = static_cast<T*>(args.values);
  const float scale = args.scale * kLog2E;
  const int panels = layout.dim / 16;
  const bool in_place = layout.page_size % kChunk == 0;
  const int32_t lowest = *std::min_element(work.low + first, work.low + last);
  for (int64_t tile = std::max<int64_t>(phase.key_begin, lowest / kKeyTile * kKeyTile); tile < phase.key_end;
       tile += kKeyTile) {
    const int blocks = int(std::min<int64_t>(kKeyTile / kBlock, ceil_div(phase.key_end - tile, kBlock)));
    const int chunks = (blocks + 1) / 2;
    const int needless = int(std::max<int64_t>(0, lowest - tile) / kChunk);  // chunks below every row's window
    T *key_blocks[kKeyTile / kBlock], *value_chunks[kKeyTile / kChunk];
    for (int b = 0; b < blocks; b++) {
      const int64_t at = tile + b * kBlock;
      key_blocks[b] = layout.key_block(keys, pages[at / layout.page_size], head, at % layout.page_size);
    }
    int64_t panel_size = layout.value_panel();
    if (in_place) {
      for (int c = needless; c < chunks; c++) {
        const int64_t at = tile + c * kChunk;
        value_chunks[c] = layout.value_pair(values, pages[at / layout.page_size], head, at % layout.page_size);
        for (int d = 0; d < panels; d++)  // fetched while Q K^T runs
          for (int line = 0; line < kChunk * 16; line += 64 / int(sizeof(T)))
            __builtin_prefetch(value_chunks[c] + d * panel_size + line, 0, 3);
      }
    } else {
      panel_size = kChunk * 16;
      for (int c = needless; c < chunks; c++) {
        value_chunks[c] = work.values + c * kChunk * layout.dim;
        for (int b = 2 * c; b < 2 * c + 2; b++) {
          T* to = value_chunks[c] + b % 2 * kBlock * 16;
          if (b < blocks) {
            const int64_t at = tile + b * kBlock;
            const T* from = layout.value_pair(values, pages[at / layout.page_size], head, at % layout.page_size);
            for (int d = 0; d < panels; d++)
              std::memcpy(to + d * panel_size, from + d * layout.value_panel(), kBlock * 16 * sizeof(T));
          } else {
            for (int d = 0; d < panels; d++) std::memset(to + d * panel_size, 0, kBlock * 16 * sizeof(T));
          }
        }
      }
    }
    for (int64_t row = first; row < last; row += kRows) {
      const int count = int(std::min<int64_t>(kRows, last - row));
      int32_t low = work.low[row], high = work.high[row];
      for (int r = 1; r < count; r++)
        low = std::min(low, work.low[row + r]), high = std::max(high, work.high[row + r]);
      const int begin = int(std::max<int64_t>(0, low - tile) / kChunk * 2);
      const int end = int(std::min<int64_t>(blocks, ceil_div(high - tile, kBlock)));
      if (begin >= end) continue;
      multiply(work.queries + row * layout.depth, layout.depth, count, layout.depth, 1, end - begin,
               [&](int p, int) -> const T* { return key_blocks[begin + p]; }, work.scores + begin * kBlock, kKeyTile,
               false);
      alignas(64) float rescale[kRows];
      softmax_rows(work, row, count, tile, begin, end, scale, rescale);
      multiply(work.probabilities + begin * kBlock, kKeyTile, count, kChunk, (end + 1) / 2 - begin / 2, panels,
               [&](int p, int c) -> const T* { return value_chunks[begin / 2 + c] + p * panel_size; }, work.product,
               layout.dim, false);
      for (int r = 0; r < count; r++) {
        float* output = work.output + (row + r) * layout.dim;
        const f32x16 factor = splat(rescale[r]);
        for (int d = 0; d < layout.dim; d += 16)
          store(output + d, fma(load(output + d), factor, load(work.product + r * layout.dim + d)));
      }
    }
  }
}

template <class T>
static void attend_task(const AttentionArguments& args, const AttentionTask& task, int64_t head) {
  const Layout<T> layout(args);
  const AttentionPlan& plan = *args.plan;
  const int64_t group = args.num_heads / args.num_kv_heads, rows = task.num_tokens * group;
  Workspace<T> work(rows, layout);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = task.first_token + row / group;
    T* query = work.queries + row * layout.depth;
    norm_and_rotate(static_cast<const T*>(args.q) + token * args.q_row_size + (head * group + row % group) * layout.dim,
                    static_cast<const T*>(args.q_norm), args.eps, args.rope + plan.positions[token] * layout.dim,
                    layout.dim, query);
    for (int d = layout.dim; d < layout.depth; d++) query[d] = T{};
    work.high[row] = plan.last_key[token] + 1;
    work.low[row] = args.window ? std::max<int32_t>(0, work.high[row] - int32_t(args.window)) : 0;
  }
  std::memset(work.output, 0, size_t(rows * layout.dim) * sizeof(float));
  std::memset(work.sum, 0, size_t(rows * 16) * sizeof(float));
  for (int64_t row = 0; row < rows + kRows; row++) work.maximum[row] = kNoScore;
  for (int i = 0; i < task.num_phases; i++)
    attend_phase(args, layout, work, plan.phases[task.first_phase + i], head);
  for (int64_t row = 0; row < rows; row++) {
    const int64_t out_row = (task.first_token + row / group) * args.num_heads + head * group + row % group;
    const float sum = reduce_add(load(work.sum + row * 16));
    const f32x16 inverse = splat(1.f / sum);
    T* out = static_cast<T*>(args.out) + out_row * layout.dim;
    // + 0: a sum that is -0 in one order of skipping may be +0 in another
    for (int d = 0; d < layout.dim; d += 16)
      store(out + d, load(work.output + row * layout.dim + d) * inverse + splat(0.f));
    if (args.lse) args.lse[out_row] = work.maximum[row] + std::log2(sum);
  }
}

template <class T>
static void attention_of(const AttentionArguments& args) {
  const AttentionPlan& plan = *args.plan;
  const std::vector<KeyRun>& runs = args.kv_plan->runs;
  const int64_t heads = args.num_kv_heads;
  const int64_t run_items = int64_t(runs.size()) * heads;
  parallel_for(run_items, std::max<int64_t>(1, run_items / (8 * num_threads())), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) write_run<T>(args, runs[i / heads], i % heads);
  });
  // Where tasks abound, a thread takes all heads of one: they lie side by side in its pages.
  const int64_t tasks = int64_t(plan.tasks.size()), grain = tasks >= 8 * num_threads() ? heads : 1;
  parallel_for(tasks * heads, grain, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] Matrix matrix;
    for (int64_t i = begin; i < end; i++) attend_task<T>(args, plan.tasks[i / heads], i % heads);
  });
}

static void attention_forward(const AttentionArguments& args) {
  if (args.dtype == kBFloat16)
    attention_of<bf16>(args);
  else
    attention_of<float>(args);
}
