// Independent ranges of work on a few threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace percov2 {

// Runs work(first, last) over [0, items), split evenly on up to `threads` threads.
// Throws std::invalid_argument unless threads >= 1; rethrows the first exception of a worker.
template <class Work>
void parallel_ranges(std::int64_t items, int threads, Work&& work) {
  if (threads < 1) {
    throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be >= 1");
  }
  const std::int64_t parts = std::min<std::int64_t>(threads, items);
  if (parts <= 1) {
    work(std::int64_t{0}, items);
    return;
  }
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(parts));
  const auto run = [&](std::int64_t part) {
    try {
      work(items * part / parts, items * (part + 1) / parts);
    } catch (...) {
      errors[static_cast<std::size_t>(part)] = std::current_exception();
    }
  };
  std::vector<std::thread> pool;
  pool.reserve(static_cast<std::size_t>(parts - 1));
  for (std::int64_t part = 1; part < parts; ++part) {
    try {
      pool.emplace_back(run, part);
    } catch (const std::system_error&) {
      run(part);  // no thread to be had: the caller's own does the work
    }
  }
  run(0);
  for (std::thread& thread : pool) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace percov2
