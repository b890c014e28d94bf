/* Reads a buffer of 64-bit integers as fast as it can and returns their sum, which the caller knows: a loop that the
   compiler threw away, or that read something else, would be found out. Several streams at once, and prefetches
   `ahead` bytes in front of each, because one stream does not keep enough cache misses in flight to saturate the
   memory of a server processor. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef uint64_t lanes __attribute__((vector_size(64)));

enum { kChunk = 512, kVectors = kChunk / 64 };

uint64_t read_sum(const char* buffer, size_t bytes, int streams, int ahead, int repeats) {
  lanes sum[kVectors];
  memset(sum, 0, sizeof sum);
  size_t segment = bytes / streams;
  for (int r = 0; r < repeats; r++) {
    for (size_t offset = 0; offset < segment; offset += kChunk)
      for (int s = 0; s < streams; s++) {
        const lanes* chunk = (const lanes*)(buffer + s * segment + offset);
        for (int v = 0; v < kVectors; v++) {
          if (ahead) __builtin_prefetch((const char*)(chunk + v) + ahead);
          sum[v] += chunk[v];
        }
      }
    __asm__ volatile("" ::: "memory"); /* the next round has to read again */
  }
  uint64_t total = 0;
  for (int v = 0; v < kVectors; v++)
    for (int lane = 0; lane < 8; lane++) total += sum[v][lane];
  return total;
}
