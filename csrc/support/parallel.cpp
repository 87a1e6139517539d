#include "support/parallel.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace percov2 {
namespace parallel {
namespace {

constexpr int kMostThreads = 256;
// Spins before a thread sleeps, about 20 microseconds: passes make many short calls in a row, and
// waking a thread takes longer than most of them.
constexpr int kLooks = 400;

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// One call of run().
struct Job {
  std::int64_t count;
  int helpers;  // threads that may still join
  void (*piece)(void*, std::int64_t);
  void* context;
  std::atomic<std::int64_t> next{0};
  std::atomic<int> inside{0};  // helpers at work
  std::mutex failing;
  std::exception_ptr error;

  void work() {
    for (std::int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) {
      try {
        piece(context, i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing);
        if (!error) error = std::current_exception();
      }
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    const bool one = job.helpers == 1;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start(job.helpers);
      jobs_.push_back(&job);
      waiting_jobs_.fetch_add(1);
    }
    if (one) {
      wake_.notify_one();
    } else {
      wake_.notify_all();
    }
    job.work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      withdraw(job);
    }
    for (int look = 0; look < kLooks && job.inside.load(std::memory_order_acquire) > 0; ++look) {
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    left_.wait(lock, [&] { return job.inside.load() == 0; });
  }

 private:
  // Starts threads for `helpers` more pieces, fewer if the system refuses.
  void start(int helpers) {
    while (threads_ < std::min(helpers, kMostThreads)) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;
      }
      ++threads_;
    }
  }

  // No more threads join the job.
  void withdraw(Job& job) {
    for (auto it = jobs_.begin(); it != jobs_.end(); ++it) {
      if (*it == &job) {
        jobs_.erase(it);
        waiting_jobs_.fetch_sub(1);
        return;
      }
    }
  }

  void serve() {
    for (;;) {
      for (int look = 0; look < kLooks && waiting_jobs_.load(std::memory_order_acquire) == 0;
           ++look) {
        pause();
      }
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      job.inside.fetch_add(1);
      if (--job.helpers == 0) withdraw(job);
      lock.unlock();
      job.work();
      lock.lock();
      withdraw(job);  // no piece of it is left
      // The job may be destroyed as soon as the lock is released.
      if (job.inside.fetch_sub(1) == 1) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable left_;
  std::list<Job*> jobs_;  // jobs with room for helpers
  std::atomic<int> waiting_jobs_{0};
  int threads_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

// Never destroyed: its threads may outlive every destructor.
Pool& pool() {
  Pool* current = the_pool.load();
  if (current != nullptr) return *current;
#if defined(__unix__) || defined(__APPLE__)
  // A forked child has no threads, and locks in an arbitrary state.
  static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
  static_cast<void>(registered);
#endif
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

}  // namespace

void run(std::int64_t count, int helpers, void (*piece)(void*, std::int64_t), void* context) {
  Job job{};
  job.count = count;
  job.helpers = std::max(0, helpers);
  job.piece = piece;
  job.context = context;
  if (job.helpers == 0) {
    job.work();
  } else {
    pool().run(job);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace parallel
}  // namespace percov2
