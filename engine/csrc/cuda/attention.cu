// Paged decode attention: a tile of up to 16 (token, query head) rows that share a key/value head, against that head's
// keys and values, N = 64 at a time (128 where heads are no wider than 64), as Triton's walk takes them.
//
//            4 warps share the keys of a tile        every warp has every row        4 warps share the columns
//   q [16, Dh] --- S = q k^T [16, N], by N / 4    --- softmax over S, in shared --- o += P V [16, Dh], by Dh / 4
//                    each, into shared memory           memory, by each warp          columns each, in registers
//
// A row of S lies with the same four threads in all warps, so that each warp has the probabilities it multiplies by V
// in the registers that the matrix instruction wants them in, and nothing but S crosses between warps. Each warp takes
// the same exponentials: 4 x 16 x N of them in a tile are 4 N cycles of the special function units.
//
// Bytes: a tile of keys and values is N x Dh x 2 x 2 bytes, 32 KiB in bf16 at any of these widths but 96 and 256, for
// 4 x 16 x N x Dh operations, 16 a byte: memory is the limit as long as the rest is hidden behind it. An H200 moves
// 4.3 TB/s, which is 32 KiB per microsecond and multiprocessor; latency under load is near one microsecond, so 32 KiB
// have to be under way at all times: while a tile is computed, the values of the next and the keys of the next two are,
// 48 KiB for each block that a multiprocessor holds. Beside keys and values a batch moves its queries and outputs,
// 1 / context of that, and partial results: 4 (Dh + 2) bytes a row and split of 512 keys, written and read, 3% of a
// split's bytes at 8 rows a head. So 85% of the bandwidth is what this should reach. No GPU has run it yet.
//
// Arithmetic: that of engine/kernels/triton/attention.py on compute capability 9, operation by operation, contracted
// only where the source says __fmaf_rn (-fmad=false). The probabilities of a row are added up as Triton adds up what a
// matrix instruction leaves in the registers of four threads: each its own, in sequence (Triton 3.6) or as a tree of
// neighbours (3.9), then the four of them; at Dh = 256, where two of Triton's warps share a row, each half so, and then
// the two. That leaves one question, for a GPU: whether m16n8k16 here and wgmma there round alike.
#include "attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace caduceus {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 16;         // of a tile: the height of the matrix instruction
constexpr int kSplit = 512;       // keys summed on their own before they are folded into what came before
constexpr int kItem = 8;          // numbers of an item
constexpr int kTurn = 3;          // numbers of a token to fold
constexpr int kMaxDevices = 64;
constexpr float kNoScore = -1e30f;  // the running maximum before the first key

// As many as Triton takes: tiles widened from e4m3 leave no registers for more than 64.
constexpr int keys_of_tile(int64_t head_dim, bool widened) { return head_dim <= 64 && !widened ? 128 : 64; }

template <class T, class Page, int DIM>
struct Shape {
  static constexpr bool kConverts = sizeof(Page) != sizeof(T);  // pages are e4m3: tiles are widened in shared memory
  static constexpr int kStages = 2;
  static constexpr int kKeys = keys_of_tile(DIM, kConverts);
  static constexpr int kScores = kKeys + 8;  // floats from one row of S to the next: 8 more keep rows in other banks
  // 16 bytes more than a row needs: 8 rows at a distance of an odd number of 16-byte units lie in different banks.
  static constexpr int kPageStride = DIM + 16 / int(sizeof(Page));
  static constexpr int kStride = DIM + 8;
  static constexpr int kStageBytes = kKeys * kPageStride * int(sizeof(Page));
  static constexpr int kWideBytes = kConverts ? kKeys * kStride * int(sizeof(T)) : 0;
  static constexpr int kBytes = 2 * kStages * kStageBytes + 2 * kWideBytes + kRows * kScores * 4;
};

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory past the first-level cache; zeros where there is nothing to read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// c [16, 8] += a [16, 16] b [16, 8]
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t rounded_pair(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t rounded_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Four e4m3 values in the model's dtype; both dtypes hold all of them exactly.
template <class T>
__device__ __forceinline__ uint2 widened(uint32_t four) {
  uint32_t pairs[2];
  for (int i = 0; i < 2; ++i) {
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(four >> (16 * i)), __NV_E4M3);
    const float2 wide = __half22float2(__half2(raw));
    pairs[i] = rounded_pair(wide.x, wide.y, T());
  }
  return {pairs[0], pairs[1]};
}

// The largest or the sum over the four threads that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}
__device__ __forceinline__ float row_sum(float x) {
  x = x + __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 1);
}

template <int N>
__device__ __forceinline__ float tree_sum(const float* x) {
  if constexpr (N == 1) return x[0];
  else return tree_sum<N / 2>(x) + tree_sum<N / 2>(x + N / 2);
}

// The sum over a row of which this thread has x[0] .. x[N - 1] and three others have the rest.
template <int N>
__device__ __forceinline__ float added_up(const float* x, bool tree) {
  if (tree) return row_sum(tree_sum<N>(x));
  float sum = x[0];
#pragma unroll
  for (int i = 1; i < N; ++i) sum = sum + x[i];
  return row_sum(sum);
}

// Two softmaxes of different keys: their common maximum, and the factors that bring either's sums to it.
struct Join {
  float top, first, second;
  __device__ __forceinline__ Join(float first_max, float second_max)
      : top(fmaxf(first_max, second_max)), first(exp2_approximate(first_max - top)),
        second(exp2_approximate(second_max - top)) {}
  __device__ __forceinline__ float operator()(float x, float y) const { return __fmaf_rn(x, first, y * second); }
};

// Rows that are not there have a sum of 0, and are divided by 1; + 0 makes a -0 the 0 it is in another order of skipping.
__device__ __forceinline__ float inverse(float sum) { return __fdiv_rn(1.f, sum > 0.f ? sum : 1.f); }
__device__ __forceinline__ float finished(float x, float inverse_sum) { return x * inverse_sum + 0.f; }

// The softmax of some keys: exponentials are of (score - top), and acc is their product with V.
template <int TILES>
struct Part {
  float top[2], sum[2], acc[TILES][4];  // of rows g and g + 8; acc[i] are columns 8 i + 2 q and the next, of both

  __device__ __forceinline__ void clear() {
    for (int half = 0; half < 2; ++half) top[half] = kNoScore, sum[half] = 0.f;
#pragma unroll
    for (int i = 0; i < TILES; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] = 0.f;
  }

  // Takes in a part whose keys come after.
  __device__ __forceinline__ void fold(const Part& next) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Join join(top[half], next.top[half]);
      top[half] = join.top;
      sum[half] = join(sum[half], next.sum[half]);
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        for (int j = 2 * half; j < 2 * half + 2; ++j) acc[i][j] = join(acc[i][j], next.acc[i][j]);
    }
  }
};

template <class T, class Page, int DIM>
__global__ void __launch_bounds__(kThreads, DIM < 128 ? 2 : 1) decode(const AttentionDecode a) {
  using S = Shape<T, Page, DIM>;
  constexpr int kKeys = S::kKeys, kScores = S::kScores;
  constexpr int kParts = DIM > 128 ? 2 : 1;          // of a row, that are added up on their own
  constexpr int kShare = kKeys / 8 / kWarps;         // of 8 keys, in a warp's share of S
  constexpr int kSteps = DIM / 16;                   // matrix instructions along the head width
  constexpr int kTiles = DIM / 8 / kWarps;           // of 8 columns, in a warp's share of the output
  constexpr int kChunks = DIM * int(sizeof(Page)) / 16;  // 16-byte pieces of a row of a page
  constexpr int kPasses = kKeys / 32;                // four threads copy a row: 32 rows at a time
  extern __shared__ __align__(128) char memory[];
  char* const key_stages = memory;
  char* const value_stages = key_stages + S::kStages * S::kStageBytes;
  char* const wide = value_stages + S::kStages * S::kStageBytes;
  float* const scores = reinterpret_cast<float*>(wide + 2 * S::kWideBytes);

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int group = int(a.num_heads / a.num_kv_heads), page_size = int(a.page_size), window = int(a.window);
  const int num_kv_heads = int(a.num_kv_heads);
  const int work = a.counts[1] * num_kv_heads;

  for (int number = blockIdx.x; number < work; number += gridDim.x) {
    const int head = number % num_kv_heads;
    const int* const item = a.items + int64_t(number / num_kv_heads) * kItem;
    const int first_row = item[0], num_rows = min(item[1], int(a.num_tokens) * group - first_row);  // may be none
    const int key_begin = item[3], key_end = item[4];
    const int seen_begin = item[5], seen_end = item[6], partial = item[7];
    const int* const table = a.tables + item[2];
    const int num_tiles = (key_end - key_begin + kKeys - 1) / kKeys;

    // ---- rows g and g + 8 of this thread: where they are, and which keys they see ----
    int token[2], query_head[2], low[2], high[2];
    bool there[2];
    uint32_t queries[kSteps][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = g + 8 * half;
      there[half] = row < num_rows;
      token[half] = there[half] ? (first_row + row) / group : 0;
      query_head[half] = there[half] ? head * group + (first_row + row) % group : 0;
      high[half] = there[half] ? a.last_keys[token[half]] + 1 : 0;
      low[half] = window ? high[half] - window : 0;
      const T* const from =
          static_cast<const T*>(a.q) + (int64_t(token[half]) * a.num_heads + query_head[half]) * DIM + 2 * q;
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
        for (int k = 0; k < 2; ++k)
          queries[step][half + 2 * k] =
              there[half] ? *reinterpret_cast<const uint32_t*>(from + 16 * step + 8 * k) : 0u;
    }

    // ---- copies: this thread's rows of a tile are thread / 4 and 32 more ----
    int pages[kPasses];       // of the tile of keys that is copied next
    int64_t places[kPasses];  // elements from the start of the pages, of the tile of values that is copied next
    bool has[kPasses];
    const auto look_up = [&](int tile) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int key = key_begin + tile * kKeys + thread / 4 + 32 * pass;
        pages[pass] = key < key_end ? table[key / page_size] : -1;
      }
    };
    const auto copy = [&](char* stage, const void* from) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        Page* const to = reinterpret_cast<Page*>(stage) + (thread / 4 + 32 * pass) * S::kPageStride;
        const Page* const source = static_cast<const Page*>(from) + places[pass];
#pragma unroll
        for (int i = 0; i < (kChunks + 3) / 4; ++i) {
          const int chunk = 4 * i + thread % 4;
          if (kChunks % 4 == 0 || chunk < kChunks)
            copy_async(to + chunk * (16 / sizeof(Page)), source + chunk * (16 / sizeof(Page)), has[pass]);
        }
      }
      commit();
    };
    const auto copy_keys = [&](int tile) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int key = key_begin + tile * kKeys + thread / 4 + 32 * pass;
        has[pass] = pages[pass] >= 0;
        const int64_t slot = (int64_t(has[pass] ? pages[pass] : 0) * num_kv_heads + head) * page_size + key % page_size;
        places[pass] = has[pass] ? slot * DIM : 0;
      }
      copy(key_stages + tile % S::kStages * S::kStageBytes, a.keys);
      look_up(tile + 1);
    };
    const auto copy_values = [&](int tile) {  // of the tile whose keys were copied last
      copy(value_stages + tile % S::kStages * S::kStageBytes, a.values);
    };

    Part<kTiles> whole, part;
    whole.clear();
    part.clear();
    __syncthreads();  // the item before has been computed
    look_up(0);
    copy_keys(0);
#pragma unroll
    for (int tile = 0; tile < S::kStages - 1; ++tile) {
      copy_values(tile);
      copy_keys(tile + 1);
    }

    for (int tile = 0; tile < num_tiles; ++tile) {
      const int first_key = key_begin + tile * kKeys;
      const T* key_tile = reinterpret_cast<const T*>(key_stages + tile % S::kStages * S::kStageBytes);
      const T* value_tile = reinterpret_cast<const T*>(value_stages + tile % S::kStages * S::kStageBytes);
      if constexpr (S::kConverts) {
        wait_for_all_but<2 * S::kStages - 3>();
        __syncthreads();
        for (int i = thread; i < 2 * kKeys * DIM / 16; i += kThreads) {
          const int which = i / (kKeys * DIM / 16), row = i / (DIM / 16) % kKeys, column = i % (DIM / 16) * 16;
          const char* const stage = (which ? value_stages : key_stages) + tile % S::kStages * S::kStageBytes;
          const uint4 from = *reinterpret_cast<const uint4*>(stage + row * S::kPageStride + column);
          uint2 to[4] = {widened<T>(from.x), widened<T>(from.y), widened<T>(from.z), widened<T>(from.w)};
          uint4* const place = reinterpret_cast<uint4*>(
              reinterpret_cast<T*>(wide + which * S::kWideBytes) + row * S::kStride + column);
          place[0] = {to[0].x, to[0].y, to[1].x, to[1].y};
          place[1] = {to[2].x, to[2].y, to[3].x, to[3].y};
        }
        key_tile = reinterpret_cast<const T*>(wide);
        value_tile = reinterpret_cast<const T*>(wide + S::kWideBytes);
      } else {
        wait_for_all_but<2 * S::kStages - 2>();
      }
      __syncthreads();

      // ---- this warp's share of S ----
      float c[kShare][4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int i = 0; i < kShare; i += 2) {
          uint32_t b[4];
          const int row = (warp * kShare + i) * 8 + lane / 16 * 8 + lane % 8;
          load_matrices(b, key_tile + row * S::kStride + step * 16 + lane / 8 % 2 * 8);
          multiply(c[i], queries[step], b[0], b[1], T());
          multiply(c[i + 1], queries[step], b[2], b[3], T());
        }
#pragma unroll
      for (int i = 0; i < kShare; ++i)
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(scores + (g + 8 * half) * kScores + (warp * kShare + i) * 8 + 2 * q) =
              make_float2(c[i][2 * half], c[i][2 * half + 1]);

      if constexpr (!S::kConverts) wait_for_all_but<2 * S::kStages - 3>();
      __syncthreads();
      copy_values(tile + S::kStages - 1);  // in the place of the tile before, which all have multiplied by
      copy_keys(tile + S::kStages);        // in the place of this one

      // ---- softmax ----
      const bool all_seen = first_key >= seen_begin && first_key + kKeys <= seen_end;
      uint32_t probabilities[kKeys / 16][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float s[kKeys / 4];
        float largest = -INFINITY;
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          const float2 pair = *reinterpret_cast<const float2*>(scores + (g + 8 * half) * kScores + 8 * j + 2 * q);
          s[2 * j] = pair.x, s[2 * j + 1] = pair.y;
          const int key = first_key + 8 * j + 2 * q;
          if (!all_seen)
            for (int k = 0; k < 2; ++k)
              if (key + k < low[half] || key + k >= high[half]) s[2 * j + k] = -INFINITY;
          largest = fmaxf(largest, fmaxf(s[2 * j], s[2 * j + 1]));
        }
        const float top = fmaxf(part.top[half], row_max(largest) * a.factor);
#pragma unroll
        for (int j = 0; j < kKeys / 8; ++j) {
          for (int k = 2 * j; k < 2 * j + 2; ++k) s[k] = exp2_approximate(__fmaf_rn(s[k], a.factor, -top));
          probabilities[j / 2][half + 2 * (j % 2)] = rounded_pair(s[2 * j], s[2 * j + 1], T());
        }
        float sum = added_up<kKeys / 4 / kParts>(s, a.tree_sums);
        if constexpr (kParts == 2) sum = sum + added_up<kKeys / 8>(s + kKeys / 8, a.tree_sums);
        const float rescale = exp2_approximate(part.top[half] - top);
        part.top[half] = top;
        part.sum[half] = __fmaf_rn(part.sum[half], rescale, sum);
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
          for (int j = 2 * half; j < 2 * half + 2; ++j) part.acc[i][j] = part.acc[i][j] * rescale;
      }

      // ---- acc += P V, this warp's columns ----
#pragma unroll
      for (int step = 0; step < kKeys / 16; ++step) {
#pragma unroll
        for (int i = 0; i < kTiles; i += 2) {
          uint32_t b[4];
          // Two tiles of 8 columns at once; where the number of tiles is odd, the last is read twice.
          const int next = i + 1 < kTiles ? lane / 16 : 0;
          load_transposed(b, value_tile + (step * 16 + lane % 16) * S::kStride + (warp * kTiles + i + next) * 8);
          multiply(part.acc[i], probabilities[step], b[0], b[1], T());
          if (i + 1 < kTiles) multiply(part.acc[i + 1], probabilities[step], b[2], b[3], T());
        }
      }
      if ((first_key + kKeys) % kSplit == 0 && tile + 1 < num_tiles) {
        whole.fold(part);
        part.clear();
      }
    }
    wait_for_all_but<0>();

    // ---- a split goes to memory as it is, the whole is folded and divided ----
    if (partial < 0) whole.fold(part);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!there[half]) continue;
      const int column = warp * kTiles * 8 + 2 * q;
      if (partial >= 0) {
        const int64_t place = int64_t(partial + token[half] - first_row / group) * a.num_heads + query_head[half];
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
          *reinterpret_cast<float2*>(a.sums + place * DIM + column + 8 * i) =
              make_float2(part.acc[i][2 * half], part.acc[i][2 * half + 1]);
        if (warp == 0 && q == 0)
          *reinterpret_cast<float2*>(a.softmaxes + place * 2) = make_float2(part.top[half], part.sum[half]);
        continue;
      }
      T* const to = static_cast<T*>(a.out) + (int64_t(token[half]) * a.num_heads + query_head[half]) * DIM + column;
      const float inverse_sum = inverse(whole.sum[half]);
#pragma unroll
      for (int i = 0; i < kTiles; ++i)
        *reinterpret_cast<uint32_t*>(to + 8 * i) =
            rounded_pair(finished(whole.acc[i][2 * half], inverse_sum),
                         finished(whole.acc[i][2 * half + 1], inverse_sum), T());
    }
  }
}

// Rows whose splits went to memory: a warp folds one row's in order, DIM / 32 columns in a thread.
// 8 blocks on a multiprocessor, no more: left alone, the compiler saves registers for 16 and spills some.
template <class T, int DIM>
__global__ void __launch_bounds__(kThreads, 8) fold(const AttentionDecode a) {
  constexpr int kPairs = (DIM / 2 + 31) / 32;  // of columns in a thread; at 96 only half of the threads have a second
  const int lane = threadIdx.x % 32, num_heads = int(a.num_heads);
  const int work = a.counts[2] * num_heads;
  for (int number = blockIdx.x * kWarps + threadIdx.x / 32; number < work; number += gridDim.x * kWarps) {
    const int* const turn = a.turns + int64_t(number / num_heads) * kTurn;
    const int head = number % num_heads, num_parts = turn[2];
    if (turn[0] >= a.num_tokens) continue;
    const int* const parts = a.parts + turn[1];
    float top = kNoScore, sum = 0.f, acc[kPairs][2] = {};
#pragma unroll 4
    for (int i = 0; i < num_parts; ++i) {
      const int64_t place = int64_t(parts[i]) * num_heads + head;
      const float2 softmax = *reinterpret_cast<const float2*>(a.softmaxes + place * 2);
      const Join join(top, softmax.x);
      top = join.top;
      sum = join(sum, softmax.y);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int column = (pair * 32 + lane) * 2;
        if (column >= DIM) continue;
        const float2 next = *reinterpret_cast<const float2*>(a.sums + place * DIM + column);
        acc[pair][0] = join(acc[pair][0], next.x);
        acc[pair][1] = join(acc[pair][1], next.y);
      }
    }
    T* const to = static_cast<T*>(a.out) + (int64_t(turn[0]) * num_heads + head) * DIM;
    const float inverse_sum = inverse(sum);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int column = (pair * 32 + lane) * 2;
      if (column < DIM)
        *reinterpret_cast<uint32_t*>(to + column) =
            rounded_pair(finished(acc[pair][0], inverse_sum), finished(acc[pair][1], inverse_sum), T());
    }
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("attention_decode: ") + what + ": " + cudaGetErrorString(status));
}

template <class T, class Page, int DIM>
void launch(const AttentionDecode& arguments, cudaStream_t stream) {
  using S = Shape<T, Page, DIM>;
  static std::atomic<int> blocks[kMaxDevices];  // of a launch that fills the device; 0 where nobody has asked
  int device = 0;
  check(cudaGetDevice(&device), "no device");
  if (device >= kMaxDevices) throw std::runtime_error("attention_decode: more devices than it counts");
  int count = blocks[device].load(std::memory_order_relaxed);
  if (count == 0) {
    int multiprocessors = 0, resident = 0;
    check(cudaFuncSetAttribute(decode<T, Page, DIM>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes),
          "shared memory");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, decode<T, Page, DIM>, kThreads, S::kBytes),
          "occupancy");
    count = multiprocessors * (resident > 0 ? resident : 1);
    blocks[device].store(count, std::memory_order_relaxed);
  }
  decode<T, Page, DIM><<<count, kThreads, S::kBytes, stream>>>(arguments);
  check(cudaGetLastError(), "launch of decode");
  if (!arguments.has_turns) return;
  fold<T, DIM><<<count, kThreads, 0, stream>>>(arguments);
  check(cudaGetLastError(), "launch of fold");
}

template <class T, class Page>
void by_width(const AttentionDecode& arguments, cudaStream_t stream) {
  switch (arguments.head_dim) {
    case 64: return launch<T, Page, 64>(arguments, stream);
    case 96: return launch<T, Page, 96>(arguments, stream);
    case 128: return launch<T, Page, 128>(arguments, stream);
    case 256: return launch<T, Page, 256>(arguments, stream);
  }
}

void refuse(const std::string& what) { throw std::invalid_argument("attention_decode: " + what); }

void check_arguments(const AttentionDecode& a) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  if (a.type != CudaType::kBFloat16 && a.type != CudaType::kFloat16)
    refuse("queries are of type " + number(int(a.type)) + "; it takes bfloat16 (1) and float16 (2)");
  if (a.page_type != a.type && a.page_type != CudaType::kE4M3)
    refuse("pages are of type " + number(int(a.page_type)) + "; they have the queries' type or are e4m3 (3)");
  if (a.head_dim != 64 && a.head_dim != 96 && a.head_dim != 128 && a.head_dim != 256)
    refuse("head_dim is " + number(a.head_dim) + "; it takes 64, 96, 128 and 256");
  if (a.num_kv_heads < 1 || a.num_heads < 1 || a.num_heads % a.num_kv_heads != 0)
    refuse("num_heads is " + number(a.num_heads) + "; it must be a multiple of num_kv_heads (" +
           number(a.num_kv_heads) + ")");
  if (a.page_size < 16 || a.page_size % 16 != 0)
    refuse("page_size is " + number(a.page_size) + "; it must be a multiple of 16");
  if (a.window < 0) refuse("window is " + number(a.window) + "; it must be at least 1, or 0 for none");
  if (!(a.factor > 0)) refuse("factor is " + std::to_string(a.factor) + "; it must be positive");
  if (a.rows_of_tile < 1 || a.rows_of_tile > kRows)
    refuse("the plan has tiles of " + number(a.rows_of_tile) + " rows; it takes up to " + number(kRows));
  const int keys = keys_of_tile(a.head_dim, a.page_type != a.type);
  if (a.keys_of_tile != keys || a.split != kSplit)
    refuse("the plan has tiles of " + number(a.keys_of_tile) + " keys and splits of " + number(a.split) +
           "; the bits need " + number(keys) + " and " + number(kSplit));
  for (const void* address : {a.q, a.keys, a.values, static_cast<const void*>(a.out)})
    if (address == nullptr || reinterpret_cast<uintptr_t>(address) % 16 != 0)
      refuse("queries, pages and output must be given, and begin at multiples of 16 bytes");
  for (const int32_t* address : {a.items, a.counts, a.tables, a.last_keys})
    if (address == nullptr) refuse("the plan's lists must be given");
  if (a.has_turns && (a.turns == nullptr || a.parts == nullptr || a.sums == nullptr || a.softmaxes == nullptr))
    refuse("a plan with rows to fold needs its turns and parts, and memory for partial results");
}

}  // namespace

void attention_decode(const AttentionDecode& arguments, void* stream) {
  check_arguments(arguments);
  const auto on = static_cast<cudaStream_t>(stream);
  const bool narrow = arguments.page_type == CudaType::kE4M3;
  if (arguments.type == CudaType::kBFloat16)
    narrow ? by_width<__nv_bfloat16, __nv_fp8_storage_t>(arguments, on)
           : by_width<__nv_bfloat16, __nv_bfloat16>(arguments, on);
  else
    narrow ? by_width<__half, __nv_fp8_storage_t>(arguments, on) : by_width<__half, __half>(arguments, on);
}

}  // namespace caduceus
