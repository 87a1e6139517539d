// What the binding files share: how arrays cross the border. Python arrays in (borrowed), numpy
// arrays out; the interpreter lock is released while kernels work. std::invalid_argument becomes
// ValueError.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tensor_view.h"

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

void bind_attention(pybind11::module_& module);
void bind_coder(pybind11::module_& module);
void bind_transformer(pybind11::module_& module);

}  // namespace percov2
