// Memory in whole pages, some of which nobody may use.
#pragma once

#if defined(_WIN32)
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <cstddef>
#include <cstdlib>

namespace percov2_test {

inline std::size_t page_size() {
#if defined(_WIN32)
  SYSTEM_INFO system{};
  GetSystemInfo(&system);
  return system.dwPageSize;
#else
  return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
#endif
}

// `bytes` zeros in pages of their own; aborts where the system has none left.
inline unsigned char* take_pages(std::size_t bytes) {
#if defined(_WIN32)
  void* pages = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (pages == nullptr) std::abort();
#else
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) std::abort();
#endif
  return static_cast<unsigned char*>(pages);
}

// From now on, every access to these pages is a fault.
inline void fence_pages(unsigned char* pages, std::size_t bytes) {
#if defined(_WIN32)
  DWORD before = 0;
  if (VirtualProtect(pages, bytes, PAGE_NOACCESS, &before) == 0) std::abort();
#else
  if (mprotect(pages, bytes, PROT_NONE) != 0) std::abort();
#endif
}

inline void return_pages(unsigned char* pages, [[maybe_unused]] std::size_t bytes) {
#if defined(_WIN32)
  VirtualFree(pages, 0, MEM_RELEASE);
#else
  munmap(pages, bytes);
#endif
}

}  // namespace percov2_test
