// Zeroed memory aligned to a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace percov2 {

// `size` numbers, initially zero; unwritten pages take no memory.
template <class Element>
class AlignedArray {
 public:
  AlignedArray() = default;
  explicit AlignedArray(std::int64_t size) : size_(size) {
    if (size < 0 || size > kMost) throw std::bad_alloc();
    block_ = std::calloc(static_cast<std::size_t>(size) * sizeof(Element) + kLine, 1);
    if (block_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(block_);
    data_ = reinterpret_cast<Element*>((address + kLine - 1) / kLine * kLine);
  }
  AlignedArray(AlignedArray&& other) noexcept { swap(other); }
  AlignedArray& operator=(AlignedArray&& other) noexcept {
    swap(other);
    return *this;
  }
  AlignedArray(const AlignedArray&) = delete;
  AlignedArray& operator=(const AlignedArray&) = delete;
  ~AlignedArray() { std::free(block_); }

  Element* data() { return data_; }
  const Element* data() const { return data_; }
  std::int64_t size() const { return size_; }
  Element& operator[](std::int64_t index) { return data_[index]; }
  const Element& operator[](std::int64_t index) const { return data_[index]; }

  // Makes room for at least `size` numbers; growing discards the old ones.
  void grow(std::int64_t size) {
    if (size > size_) *this = AlignedArray(size);
  }

 private:
  static constexpr std::size_t kLine = 64;
  static constexpr std::int64_t kMost = std::int64_t{1} << 48;

  void swap(AlignedArray& other) {
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  void* block_ = nullptr;
  Element* data_ = nullptr;
  std::int64_t size_ = 0;
};

}  // namespace percov2
