// Bytes that grow towards lower addresses: the last one is read first, so a rANS encoder's output
// needs no reversal.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

namespace percov2 {

class ByteStack {
 public:
  // Makes room for `bytes` more and returns the top. The caller writes below it and then calls
  // `move_top` with the new top. The bytes in between are not initialised.
  std::uint8_t* reserve(std::size_t bytes) {
    if (bytes > top_) grow(bytes);
    return storage_.get() + top_;
  }
  void move_top(const std::uint8_t* top) { top_ = static_cast<std::size_t>(top - storage_.get()); }

  const std::uint8_t* data() const { return storage_.get() + top_; }
  std::size_t size() const { return capacity_ - top_; }

 private:
  // Doubling keeps the copying linear. At most twice the bytes held, plus the room, is allocated.
  void grow(std::size_t bytes) {
    const std::size_t held = size();
    const std::size_t capacity = std::max(2 * capacity_, held + bytes);
    std::unique_ptr<std::uint8_t[]> larger(new std::uint8_t[capacity]);
    if (held > 0) std::memcpy(larger.get() + (capacity - held), data(), held);
    storage_ = std::move(larger);
    capacity_ = capacity;
    top_ = capacity - held;
  }

  std::unique_ptr<std::uint8_t[]> storage_;
  std::size_t capacity_ = 0;
  std::size_t top_ = 0;
};

}  // namespace percov2
