// Attention, backward, for one sequence and one kv head at a time, so that no two threads share a sum. With rows =
// (token, query head) pairs of the kv head, D = rowsum(dO * O) and the forward's logarithm L, for every block of 64 keys
// and every block of 128 rows that sees one of them (arXiv 2205.14135, algorithm 4, keys outside):
//
//   S' = K Q'    P' = 2^(c S' - L)    dP' = V dO'    dS' = P' (dP' - D)              [keys, rows]: ' is transposed
//   dV += P' dO  dK += dS' Q          dQ' += K' dS
//
// Scores are made transposed so that every product takes its left operand as it lies and its right one as panels (see
// attention_tiles.inl), and so that L and D are vectors along the lanes. Blocks are visited in a fixed order.
#include "attention_tiles.inl"
#include "rope.inl"

constexpr int kKeyBlock = 64;
constexpr int kRowBlock = 128;
constexpr float kPadded = 1e30f;  // L of a row that does not exist: its P is 0

// One item's memory. R rows and N keys are rounded up to 32; what lies past the real ones is zero.
template <class T>
struct BackwardWorkspace {
  BackwardWorkspace(int64_t R, int64_t N, int64_t dim, int64_t depth) {
    char* base = nullptr;
    size_t bytes = 0;
    for (int pass = 0; pass < 2; pass++) {
      bytes = 0;
      auto carve = [&](auto** pointer, int64_t count) {
        *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(base + bytes);
        bytes += size_t(round_up(count * int64_t(sizeof(**pointer)), 64));
      };
      carve(&keys, N * depth), carve(&values, N * depth), carve(&keys_across, dim * N);
      carve(&queries, R * depth), carve(&d_outs, R * depth);
      carve(&queries_deep, R * dim), carve(&d_outs_deep, R * dim);
      carve(&lse, R), carve(&delta, R), carve(&low, R), carve(&high, R);
      carve(&d_queries, dim * R), carve(&d_keys, N * dim), carve(&d_values, N * dim);
      carve(&scores, kKeyBlock * kRowBlock), carve(&d_scores, kKeyBlock * kRowBlock);
      carve(&probabilities, kKeyBlock * kRowBlock), carve(&ds, kKeyBlock * kRowBlock);
      carve(&ds_panels, kKeyBlock * kRowBlock), carve(&staged, 16 * depth);
      if (!base) base = static_cast<char*>(scratch(bytes));
    }
  }
  T *keys, *values;                 // [N][depth]
  T* keys_across;                   // [dim][N]
  T *queries, *d_outs;              // [R/16][depth/pair][16][pair]
  T *queries_deep, *d_outs_deep;    // [dim/16][R/pair][16][pair]
  float *lse, *delta;               // [R]
  int32_t *low, *high;              // [R] keys a row sees
  float* d_queries;                 // [dim][R]
  float *d_keys, *d_values;         // [N][dim]
  float *scores, *d_scores;         // [64][128]
  T *probabilities, *ds;            // [64][128]
  T* ds_panels;                     // [128/16][64/pair][16][pair]
  T* staged;                        // [16][depth]
};

// Sixteen staged rows, as columns of a panel and as depth of panels.
template <class T>
SIMD_INLINE void pack_rows(const T* staged, int64_t row, int64_t R, int dim, int depth, T* panels, T* deep) {
  T* panel = panels + row * depth;
  for (int w = 0; w < depth / kPair<T>; w++)
    for (int r = 0; r < 16; r++)
      std::memcpy(panel + (w * 16 + r) * kPair<T>, staged + r * depth + w * kPair<T>, 4);
  for (int d = 0; d < dim; d += 16) {
    T* to = deep + d * R + row * 16;
    for (int r = 0; r < 16; r += kPair<T>) {
      if constexpr (kPair<T> == 1) {
        store(to + r * 16, load(staged + r * depth + d));
      } else {
        u16x16 even, odd;
        std::memcpy(&even, staged + r * depth + d, 32), std::memcpy(&odd, staged + (r + 1) * depth + d, 32);
        u32x16 word = __builtin_convertvector(even, u32x16) | __builtin_convertvector(odd, u32x16) << 16;
        std::memcpy(to + r * 16, &word, 64);
      }
    }
  }
}

// Rounds the dS of kPair neighbouring keys to T, once for the product along rows and once for the one along keys.
SIMD_INLINE void store_ds(const f32x16* v, float* row, int64_t, float* panel) { store(row, v[0]), store(panel, v[0]); }
SIMD_INLINE void store_ds(const f32x16* v, bf16* row, int64_t stride, bf16* panel) {
  store_rounded(row, v[0]), store_rounded(row + stride, v[1]);
  u16x16 even, odd;
  std::memcpy(&even, row, 32), std::memcpy(&odd, row + stride, 32);
  u32x16 word = __builtin_convertvector(even, u32x16) | __builtin_convertvector(odd, u32x16) << 16;
  std::memcpy(panel, &word, 64);
}

// dx of y = x / rms(x) * w from dy, in place; adds dy * x / rms(x) to d_norm.
template <class T>
SIMD_INLINE void norm_backward(const T* x, const T* norm, float eps, int dim, float* dy, float* d_norm) {
  alignas(64) float head[kMaxHeadDim];
  for (int d = 0; d < dim; d += 16) store(head + d, load(x + d));
  const f32x16 scale = splat(inverse_rms(head, dim, eps));
  f32x16 dot = splat(0.f);
  for (int d = 0; d < dim; d += 16) {
    f32x16 unit = load(head + d) * scale, gradient = load(dy + d);
    store(d_norm + d, fma(gradient, unit, load(d_norm + d)));
    gradient = gradient * load(norm + d);
    dot = fma(gradient, unit, dot);
    store(head + d, unit), store(dy + d, gradient);
  }
  const f32x16 mean = splat(reduce_add(dot) / float(dim));
  for (int d = 0; d < dim; d += 16) store(dy + d, scale * (load(dy + d) - load(head + d) * mean));
}

template <class T>
struct BackwardItem {
  const AttentionArguments& args;
  const AttentionBackwardArguments& grads;
  int64_t sequence, head;  // a sequence of the keys' plan
  const AttentionPlan &plan = *args.plan, &kv_plan = *args.kv_plan;
  int dim = int(args.head_dim), depth = padded_dim<T>(dim);
  int64_t group = args.num_heads / args.num_kv_heads;
  int64_t first_key = kv_plan.cu_seqlens[sequence], all_keys = kv_plan.cu_seqlens[sequence + 1] - first_key;
  int64_t first = plan.query_starts[sequence], last = plan.query_starts[sequence + 1];
  int64_t length = last > first ? plan.last_key[last - 1] + 1 : 0;  // keys that a query sees
  int64_t rows = (last - first) * group, R = round_up(rows, 32), N = round_up(length, 32);

  const T* query(int64_t row) const {
    return static_cast<const T*>(args.q) + (first + row / group) * args.q_row_size + (head * group + row % group) * dim;
  }
  T* d_query(int64_t row) const {
    return static_cast<T*>(grads.d_q) + (first + row / group) * grads.d_q_row_size +
           (head * group + row % group) * dim;
  }
  const T* key(int64_t i) const {
    return static_cast<const T*>(args.kv) + (first_key + i) * args.kv_row_size + head * dim;
  }
  T* d_key(int64_t i) const {
    return static_cast<T*>(grads.d_kv) + (first_key + i) * grads.d_kv_row_size + head * dim;
  }
  const float* query_turn(int64_t row) const { return args.rope + plan.positions[first + row / group] * dim; }
  const float* key_turn(int64_t i) const { return args.rope + kv_plan.positions[first_key + i] * dim; }

  void prepare(BackwardWorkspace<T>& work) const {
    std::memset(work.keys, 0, size_t(N * depth) * sizeof(T));
    std::memset(work.values, 0, size_t(N * depth) * sizeof(T));
    std::memset(work.keys_across, 0, size_t(dim * N) * sizeof(T));
    std::memset(work.d_queries, 0, size_t(dim * R) * sizeof(float));
    std::memset(work.d_keys, 0, size_t(N * dim) * sizeof(float));
    std::memset(work.d_values, 0, size_t(N * dim) * sizeof(float));
    for (int64_t i = 0; i < length; i++) {
      T* to = work.keys + i * depth;
      norm_and_rotate(key(i), static_cast<const T*>(args.k_norm), args.eps, key_turn(i), dim, to);
      for (int d = 0; d < dim; d++) work.keys_across[d * N + i] = to[d];
      std::memcpy(work.values + i * depth, key(i) + args.num_kv_heads * dim, size_t(dim) * sizeof(T));
    }
    for (int64_t row = 0; row < R; row += 16) {
      const int count = int(std::max<int64_t>(0, std::min<int64_t>(16, rows - row)));
      std::memset(work.staged, 0, size_t(16 * depth) * sizeof(T));
      for (int r = 0; r < count; r++)
        norm_and_rotate(query(row + r), static_cast<const T*>(args.q_norm), args.eps, query_turn(row + r), dim,
                        work.staged + r * depth);
      pack_rows(work.staged, row, R, dim, depth, work.queries, work.queries_deep);
      std::memset(work.staged, 0, size_t(16 * depth) * sizeof(T));
      for (int r = 0; r < 16; r++) {
        if (r >= count) {
          work.lse[row + r] = kPadded, work.delta[row + r] = 0.f, work.low[row + r] = 0, work.high[row + r] = 0;
          continue;
        }
        const int64_t token = first + (row + r) / group;
        const int64_t at = token * args.num_heads + head * group + (row + r) % group;
        const T *d_out = static_cast<const T*>(grads.d_out) + at * dim, *out = static_cast<const T*>(args.out) + at * dim;
        f32x16 dot = splat(0.f);
        for (int d = 0; d < dim; d += 16) dot = fma(load(d_out + d), load(out + d), dot);
        std::memcpy(work.staged + r * depth, d_out, size_t(dim) * sizeof(T));
        work.lse[row + r] = args.lse[at], work.delta[row + r] = reduce_add(dot);
        work.high[row + r] = plan.last_key[token] + 1;
        work.low[row + r] = args.window ? std::max<int32_t>(0, work.high[row + r] - int32_t(args.window)) : 0;
      }
      pack_rows(work.staged, row, R, dim, depth, work.d_outs, work.d_outs_deep);
    }
  }

  // Scores and dP of a block to P and dS.
  void differentiate(BackwardWorkspace<T>& work, int64_t key0, int num_keys, int64_t row0, int num_rows) const {
    const f32x16 factor = splat(args.scale * 1.44269504088896341f);
    for (int r = 0; r < num_rows; r += 16) {
      const f32x16 lse = load(work.lse + row0 + r), delta = load(work.delta + row0 + r);
      i32x16 low, high;
      std::memcpy(&low, work.low + row0 + r, 64), std::memcpy(&high, work.high + row0 + r, 64);
      int32_t highest_low = 0, lowest_high = INT32_MAX;
      for (int i = 0; i < 16; i++)
        highest_low = std::max(highest_low, low[i]), lowest_high = std::min(lowest_high, high[i]);
      const bool whole = highest_low <= key0 && lowest_high >= key0 + num_keys;
      for (int k = 0; k < num_keys; k += kPair<T>) {
        f32x16 ds[kPair<T>];
        for (int j = 0; j < kPair<T>; j++) {
          const int at = (k + j) * kRowBlock + r;
          f32x16 p = exp2_of_nonpositive(fma(load(work.scores + at), factor, -lse));
          if (!whole) {
            const i32x16 key = i32x16{} + int32_t(key0 + k + j);
            p = (key >= low) & (key < high) ? p : splat(0.f);
          }
          ds[j] = p * (load(work.d_scores + at) - delta);
          store_rounded(work.probabilities + at, p);
        }
        store_ds(ds, work.ds + k * kRowBlock + r, kRowBlock, work.ds_panels + r * kKeyBlock + k * 16);
      }
    }
  }

  void products(BackwardWorkspace<T>& work) const {
    for (int64_t key0 = 0; key0 < N; key0 += kKeyBlock) {
      const int num_keys = int(std::min<int64_t>(kKeyBlock, N - key0));
      for (int64_t row0 = 0; row0 < R; row0 += kRowBlock) {
        const int num_rows = int(std::min<int64_t>(kRowBlock, R - row0));
        const int32_t high = *std::max_element(work.high + row0, work.high + row0 + num_rows);
        const int32_t low = *std::min_element(work.low + row0, work.low + row0 + num_rows);
        if (high <= key0 || low >= key0 + num_keys) continue;
        auto across = [&](const T* panels) {
          return [=, this](int p, int) -> const T* { return panels + (row0 + 16 * p) * depth; };
        };
        auto deep = [&](const T* panels) {
          return [=, this](int p, int) -> const T* { return panels + p * R * 16 + row0 * 16; };
        };
        multiply(work.keys + key0 * depth, depth, num_keys, depth, 1, num_rows / 16, across(work.queries), work.scores,
                 kRowBlock, false);
        multiply(work.values + key0 * depth, depth, num_keys, depth, 1, num_rows / 16, across(work.d_outs),
                 work.d_scores, kRowBlock, false);
        differentiate(work, key0, num_keys, row0, num_rows);
        multiply(work.probabilities, kRowBlock, num_keys, num_rows, 1, dim / 16, deep(work.d_outs_deep),
                 work.d_values + key0 * dim, dim, true);
        multiply(work.ds, kRowBlock, num_keys, num_rows, 1, dim / 16, deep(work.queries_deep), work.d_keys + key0 * dim,
                 dim, true);
        multiply(work.keys_across + key0, N, dim, num_keys, 1, num_rows / 16,
                 [&](int p, int) -> const T* { return work.ds_panels + p * 16 * kKeyBlock; }, work.d_queries + row0, R,
                 true);
      }
    }
  }

  // Back through the scale, RoPE and the norms, rounded into dq and dkv.
  void finish(BackwardWorkspace<T>& work) const {
    alignas(64) float gradient[16 * kMaxHeadDim], across[16 * kMaxHeadDim];
    float* d_norms = grads.partial_norms + (sequence * args.num_kv_heads + head) * 2 * dim;
    std::memset(d_norms, 0, size_t(2 * dim) * sizeof(float));
    auto write = [&](float* dy, const T* x, const T* norm, const float* cos_sin, T* to, float* d_norm) {
      for (int d = 0; d < dim; d += 16) store(dy + d, load(dy + d) * args.scale);
      rotate(dy, cos_sin, dim, -1.f, dy);
      if (norm) norm_backward(x, norm, args.eps, dim, dy, d_norm);
      for (int d = 0; d < dim; d += 16) store(to + d, load(dy + d));
    };
    for (int64_t row = 0; row < rows; row += 16) {
      for (int d = 0; d < dim; d++) store(across + d * 16, load(work.d_queries + d * R + row));
      for (int r = 0; r < 16; r++)
        for (int d = 0; d < dim; d++) gradient[r * dim + d] = across[d * 16 + r];
      for (int r = 0; r < std::min<int64_t>(16, rows - row); r++)
        write(gradient + r * dim, query(row + r), static_cast<const T*>(args.q_norm), query_turn(row + r),
              d_query(row + r), d_norms);
    }
    for (int64_t i = 0; i < length; i++) {
      write(work.d_keys + i * dim, key(i), static_cast<const T*>(args.k_norm), key_turn(i), d_key(i), d_norms + dim);
      T* to = d_key(i) + args.num_kv_heads * dim;
      for (int d = 0; d < dim; d += 16) store(to + d, load(work.d_values + i * dim + d));
    }
    for (int64_t i = length; i < all_keys; i++) {  // keys behind the last query
      std::memset(d_key(i), 0, size_t(dim) * sizeof(T));
      std::memset(d_key(i) + args.num_kv_heads * dim, 0, size_t(dim) * sizeof(T));
    }
  }

  void run() const {
    BackwardWorkspace<T> work(R, N, dim, depth);
    prepare(work);
    products(work);
    finish(work);
  }
};

template <class T>
static void attention_backward_of(const AttentionArguments& args, const AttentionBackwardArguments& grads) {
  parallel_for(grads.num_items, 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] Matrix matrix;
    for (int64_t i = begin; i < end; i++)
      BackwardItem<T>{args, grads, grads.sequences[i / args.num_kv_heads], i % args.num_kv_heads}.run();
  });
}

static void attention_backward(const AttentionArguments& args, const AttentionBackwardArguments& grads) {
  if (args.dtype == kBFloat16)
    attention_backward_of<bf16>(args, grads);
  else
    attention_backward_of<float>(args, grads);
}
