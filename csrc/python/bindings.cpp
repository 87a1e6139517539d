// The compiled module percov2._native; use it through percov2.entropy.rans.
#include "python/bindings.h"

#include <stdexcept>
#include <string>

#include "support/isa.h"

namespace py = pybind11;

namespace percov2 {
namespace {

py::tuple instruction_sets() {
  py::list names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_available(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
  }
  return py::tuple(names);
}

void use_instruction_set(const std::string& name) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name == isa_name(static_cast<Isa>(i))) return use_isa(static_cast<Isa>(i));
  }
  throw std::invalid_argument("unknown instruction set '" + name + "'");
}

}  // namespace
}  // namespace percov2

PYBIND11_MODULE(_native, module) {
  module.doc() = "Compiled parts of percov2; use them through percov2.entropy.";
  module.def("instruction_sets", &percov2::instruction_sets);
  module.def("instruction_set", [] { return percov2::isa_name(percov2::active_isa()); });
  module.def("use_instruction_set", &percov2::use_instruction_set, pybind11::arg("name"));
  percov2::bind_attention(module);
  percov2::bind_coder(module);
  percov2::bind_cuda(module);
  percov2::bind_transformer(module);
}
