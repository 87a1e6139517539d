// Independent pieces of work on a few threads.
//
// Threads start on first use and wait without using the processor. They end with the process; a
// forked child starts its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace percov2 {

namespace parallel {
// Calls piece(context, i) for i in [0, count) on the calling thread and up to `helpers` others, and
// rethrows the first exception after all have ended. Thread-safe; a piece may call it.
void run(std::int64_t count, int helpers, void (*piece)(void*, std::int64_t), void* context);
}  // namespace parallel

// Calls work(i) for i in [0, count) on up to `threads` threads, which take pieces one by one.
// Throws std::invalid_argument unless threads >= 1; rethrows the first exception of a piece.
template <class Work>
void parallel_pieces(std::int64_t count, int threads, Work&& work) {
  if (threads < 1) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be >= 1");
  }
  if (threads == 1 || count <= 1) {
    for (std::int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  parallel::run(
      count, static_cast<int>(std::min<std::int64_t>(threads, count)) - 1,
      [](void* context, std::int64_t i) {
        (*static_cast<std::remove_reference_t<Work>*>(context))(i);
      },
      const_cast<void*>(static_cast<const void*>(&work)));
}

// Runs work(first, last) over [0, items), split evenly on up to `threads` threads.
template <class Work>
void parallel_ranges(std::int64_t items, int threads, Work&& work) {
  const std::int64_t parts = std::max<std::int64_t>(1, std::min<std::int64_t>(threads, items));
  parallel_pieces(parts, threads, [&](std::int64_t part) {
    work(items * part / parts, items * (part + 1) / parts);
  });
}

}  // namespace percov2
