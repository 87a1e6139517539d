// What the binding files share: how arrays cross the border. Python arrays in (borrowed), numpy
// arrays out; the interpreter lock is released while kernels work. std::invalid_argument becomes
// ValueError.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "python/tensor_view.h"

namespace percov2 {

template <class Element>
std::vector<Element> copy(const TensorView<Element>& view) {
  view.require_ndim(1);
  return std::vector<Element>(view.data(), view.data() + view.size());
}

template <class Element>
pybind11::array_t<Element> to_array(const std::vector<Element>& values) {
  return pybind11::array_t<Element>(static_cast<pybind11::ssize_t>(values.size()), values.data());
}

inline void same_size(const char* name, std::int64_t size, std::int64_t wanted) {
  if (size != wanted) {
    throw pybind11::value_error(std::string(name) + " has " + std::to_string(size) +
                                " elements; it must have " + std::to_string(wanted));
  }
}

// An object that changes when it is used, and the lock of those who use it.
template <class Object>
struct Shared : Object {
  using Object::Object;
  std::mutex in_use;
};

// Threads that use one object take turns: kernels work without the interpreter lock, which would
// keep them apart otherwise. To be taken with that lock held, and after all views of arguments,
// whose making may run any Python code.
class Turn {
 public:
  template <class Object>
  explicit Turn(Shared<Object>& object) : lock_(object.in_use, std::try_to_lock) {
    if (lock_.owns_lock()) return;
    const pybind11::gil_scoped_release unlocked;  // whoever has the object may wait for it
    lock_.lock();
  }

 private:
  std::unique_lock<std::mutex> lock_;
};

void bind_attention(pybind11::module_& module);
void bind_coder(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_transformer(pybind11::module_& module);

}  // namespace percov2
