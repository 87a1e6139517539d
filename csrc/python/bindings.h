// Shared parts of the bindings. Python arrays go in (borrowed), numpy arrays come out. Kernels run
// without the interpreter lock. std::invalid_argument becomes ValueError.
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

// An object with a state, and its lock.
template <class Object>
struct Shared : Object {
  using Object::Object;
  std::mutex in_use;
};

// Threads that use one object take turns, because kernels run without the interpreter lock. Take
// the object's lock with the interpreter lock held, and after making all views of arguments, which
// may run any Python code.
class Turn {
 public:
  template <class Object>
  explicit Turn(Shared<Object>& object) : lock_(object.in_use, std::try_to_lock) {
    if (lock_.owns_lock()) return;
    const pybind11::gil_scoped_release unlocked;  // the object's user may wait for this lock
    lock_.lock();
  }

 private:
  std::unique_lock<std::mutex> lock_;
};

// pybind11 makes unset memory of an object that Python made by __new__ without __init__. This
// caster refuses it.
template <class Object>
struct InitialisedCaster : pybind11::detail::type_caster_base<Object> {
  bool load(pybind11::handle source, bool convert) {
    if (pybind11::isinstance<Object>(source)) {
      auto* instance = reinterpret_cast<pybind11::detail::instance*>(source.ptr());
      if (!instance->get_value_and_holder().holder_constructed()) {
        throw pybind11::type_error(std::string(Py_TYPE(source.ptr())->tp_name) +
                                   ".__init__() was not called");
      }
    }
    return pybind11::detail::type_caster_base<Object>::load(source, convert);
  }
};

void bind_attention(pybind11::module_& module);
void bind_coder(pybind11::module_& module);
void bind_cuda(pybind11::module_& module);
void bind_transformer(pybind11::module_& module);

}  // namespace percov2

template <class Object>
class pybind11::detail::type_caster<percov2::Shared<Object>>
    : public percov2::InitialisedCaster<percov2::Shared<Object>> {};
