// One token per row by inversion: a uniform number times the kept mass, walked along the ids in order. The number is a
// hash of (seed, counter), so a row's token depends on its logits and its own parameters alone.
#include "softmax_row.h"

struct RowInput {
  const float* logits;
  int64_t vocab;
  float scale;  // z = logit * scale
};

// z and exp(z - shift) of one chunk, in memory for the scalar walks; past the row's end z is -inf.
struct ChunkTerms {
  alignas(64) float logit[kChunk];
  alignas(64) float exponential[kChunk];
  int64_t first, columns;
};
SIMD_INLINE void fill(ChunkTerms& terms, const RowInput& in, float shift, int64_t chunk) {
  terms.first = chunk * kChunk;
  terms.columns = std::min(kChunk, in.vocab - terms.first);
  for (int64_t k = 0; k < terms.columns; k += kLanes) {
    int lanes = lanes_at(k, terms.columns);
    f32x16 z = load_lanes(in.logits + terms.first + k, lanes, -__builtin_inff()) * in.scale;
    store(terms.logit + k, z);
    store(terms.exponential + k, exp(z - shift));
  }
}

// ---- filters: what a row may draw is a prefix of the order "larger z first, then smaller id" ----

struct Candidate {
  float z, exponential;
  int64_t id;
  bool before(const Candidate& other) const { return z > other.z || (z == other.z && id < other.id); }
};

// One pass counts the row in buckets of width 1/64 below the maximum; only a bucket in which a cut falls is sorted
// (sorting all of 152,000 logits takes 10 ms). The last bucket is open: its share of the mass is under e^-32 * vocab.
constexpr int kBuckets = 2048;
constexpr float kBucketsPerUnit = 64.f;

struct Buckets {
  const RowInput& in;
  const SoftmaxRow& row;
  int64_t count[kBuckets] = {};
  double mass[kBuckets] = {};
  std::vector<Candidate> sorted;
  int sorted_bucket = -1;
};
SIMD_INLINE int bucket_of(float below) { return int(std::min(below * kBucketsPerUnit, float(kBuckets - 1))); }
SIMD_INLINE void buckets_of(const ChunkTerms& terms, float largest, int32_t* bucket) {
  for (int64_t k = 0; k < terms.columns; k += kLanes) {
    f32x16 below = (largest - load(terms.logit + k)) * kBucketsPerUnit;
    i32x16 whole = __builtin_convertvector(min(below, splat(kBuckets - 1)), i32x16);
    std::memcpy(bucket + k, &whole, 64);
  }
}

static void count_buckets(Buckets& b) {
  ChunkTerms terms;
  alignas(64) int32_t bucket[kChunk];
  for (int64_t c = 0; c < chunks_of(b.in.vocab); c++) {
    fill(terms, b.in, b.row.max, c);
    buckets_of(terms, b.row.max, bucket);
    for (int64_t i = 0; i < terms.columns; i++) {
      b.count[bucket[i]]++;
      b.mass[bucket[i]] += double(terms.exponential[i]);
    }
  }
}

static const std::vector<Candidate>& sorted_bucket(Buckets& b, int bucket) {
  if (b.sorted_bucket == bucket) return b.sorted;
  b.sorted.clear();
  b.sorted_bucket = bucket;
  ChunkTerms terms;
  alignas(64) int32_t at[kChunk];
  for (int64_t c = 0; c < chunks_of(b.in.vocab); c++) {
    if (bucket_of(b.row.max - b.row.chunk_max[c]) > bucket) continue;
    fill(terms, b.in, b.row.max, c);
    buckets_of(terms, b.row.max, at);
    for (int64_t i = 0; i < terms.columns; i++)
      if (at[i] == bucket)
        b.sorted.push_back({terms.logit[i], terms.exponential[i], terms.first + i});
  }
  std::sort(b.sorted.begin(), b.sorted.end(), [](const Candidate& x, const Candidate& y) { return x.before(y); });
  return b.sorted;
}

// How many tokens are at least min_p times as likely as the likeliest.
static int64_t count_min_p(Buckets& b, float min_p) {
  float limit = float(-std::log(double(min_p)));
  int last = bucket_of(limit);
  int64_t n = 0;
  for (int i = 0; i < last; i++) n += b.count[i];
  for (const Candidate& c : sorted_bucket(b, last)) n += b.row.max - c.z <= limit;
  return n;
}

struct Prefix {
  int64_t length = 0;
  double mass = 0.0;
  Candidate last = {};
};

// The shortest prefix that has `length` tokens or at least `mass`, whichever comes first; one token at least.
static Prefix cut(Buckets& b, int64_t length, double mass) {
  Prefix prefix;
  for (int i = 0; i < kBuckets; i++) {
    if (b.count[i] == 0) continue;
    if (prefix.length + b.count[i] < length && prefix.mass + b.mass[i] < mass) {
      prefix.length += b.count[i];
      prefix.mass += b.mass[i];
      continue;
    }
    for (const Candidate& c : sorted_bucket(b, i)) {
      prefix.last = c;
      prefix.length++;
      prefix.mass += double(c.exponential);
      if (prefix.length >= length || prefix.mass >= mass) return prefix;
    }
  }
  return prefix;
}

// ---- drawing ----

// The first id whose running sum exceeds `rest`; where rounding leaves none, the last one with a positive term.
template <class Holds>
static int64_t walk(const ChunkTerms& terms, double rest, Holds holds) {
  double sum = 0.0;
  int64_t last = -1;
  for (int64_t i = 0; i < terms.columns; i++) {
    if (!(terms.exponential[i] > 0.f) || !holds(terms.logit[i], terms.first + i)) continue;
    sum += double(terms.exponential[i]);
    last = terms.first + i;
    if (sum > rest) break;
  }
  return last;
}

static int64_t draw(const RowInput& in, const SoftmaxRow& row, double u) {
  double target = u * row.total, before = 0.0, rest = 0.0;
  int64_t chosen = -1;
  for (int64_t c = 0; c < chunks_of(in.vocab); c++) {
    double mass = double(row.chunk_sum[c]) * double(row.chunk_scale[c]);
    if (!(mass > 0.0)) continue;
    chosen = c, rest = (target - before) / double(row.chunk_scale[c]);
    if (before + mass > target) break;
    before += mass;
  }
  ChunkTerms terms;
  fill(terms, in, shift_of(row.chunk_max[chosen]), chosen);
  return walk(terms, rest, [](float, int64_t) { return true; });
}

static int64_t draw_from(const RowInput& in, const SoftmaxRow& row, const Candidate& last, double u,
                         std::vector<double>& masses) {
  auto holds = [&](float z, int64_t id) { return z > last.z || (z == last.z && id <= last.id); };
  int64_t chunks = chunks_of(in.vocab);
  masses.assign(size_t(chunks), 0.0);
  ChunkTerms terms;
  double total = 0.0;
  for (int64_t c = 0; c < chunks; c++) {
    if (row.chunk_max[c] < last.z) continue;
    fill(terms, in, row.max, c);
    f32x16 sum = {}, lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t k = 0; k < terms.columns; k += kLanes) {  // `holds`, 16 ids at a time
      f32x16 z = load(terms.logit + k), e = load(terms.exponential + k), limit = splat(last.z);
      f32x16 tied = where_less(splat(float(last.id - terms.first - k)), lane, f32x16{}, e);
      sum = sum + where_less(limit, z, e, where_less(z, limit, f32x16{}, tied));
    }
    masses[size_t(c)] = double(reduce_add(sum));
    total += masses[size_t(c)];
  }
  double target = u * total, before = 0.0;
  int64_t chosen = -1;
  double rest = 0.0;
  for (int64_t c = 0; c < chunks; c++) {
    if (!(masses[size_t(c)] > 0.0)) continue;
    chosen = c, rest = target - before;
    if (before + masses[size_t(c)] > target) break;
    before += masses[size_t(c)];
  }
  fill(terms, in, row.max, chosen);
  return walk(terms, rest, holds);
}

static int64_t argmax(const RowInput& in, const SoftmaxRow& row) {
  int64_t c = 0;
  while (row.chunk_max[c] != row.max) c++;
  int64_t id = c * kChunk;
  while (in.logits[id] * in.scale != row.max) id++;
  return id;
}

static void sample_token_rows(const float* logits, const float* temperature, const int32_t* top_k, const float* top_p,
                              const float* min_p, const int64_t* seed, const int64_t* counter, int32_t* tokens,
                              float* logprobs, float* kept_mass, int64_t rows, int64_t vocab) {
  parallel_for(rows, rows_per_item(vocab), [=](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> scratch(new float[scratch_floats(vocab)]);
    std::vector<double> masses;
    for (int64_t r = begin; r < end; r++) {
      bool greedy = temperature[r] == 0.f;
      RowInput in{logits + r * vocab, vocab, greedy ? 1.f : 1.f / temperature[r]};
      SoftmaxRow row = softmax_row<false>(in.logits, vocab, in.scale, scratch.get());
      if (!(row.total > 0.0)) {  // NaN: a NaN or +inf among the logits, or nothing but -inf
        tokens[r] = -1;
        logprobs[r] = kept_mass[r] = __builtin_nanf("");
        continue;
      }
      bool cut_k = top_k[r] > 0 && top_k[r] < vocab, cut_p = top_p[r] < 1.f, cut_min = min_p[r] > 0.f;
      int64_t id;
      kept_mass[r] = 1.f;
      if (greedy) {
        id = argmax(in, row);
      } else if (!cut_k && !cut_p && !cut_min) {
        id = draw(in, row, uniform(seed[r], counter[r]));
      } else {
        auto b = std::unique_ptr<Buckets>(new Buckets{in, row});
        count_buckets(*b);
        const double no_limit = std::numeric_limits<double>::infinity();
        int64_t length = cut_min ? count_min_p(*b, min_p[r]) : vocab;
        if (cut_k) length = std::min<int64_t>(length, top_k[r]);
        Prefix prefix = cut(*b, length, no_limit);
        if (cut_p) prefix = cut(*b, length, double(top_p[r]) * prefix.mass);
        id = draw_from(in, row, prefix.last, uniform(seed[r], counter[r]), masses);
        kept_mass[r] = float(std::min(1.0, prefix.mass / row.total));
      }
      tokens[r] = int32_t(id);
      logprobs[r] = logprob_of(row, in.logits[id] * in.scale);
    }
  });
}
