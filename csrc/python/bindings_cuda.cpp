// The coder on CUDA devices for Python. Arrays are DLPack tensors that stay on their device. In a
// build without CUDA the same functions raise an error.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include "cuda/coder_cuda.h"
#include "python/bindings.h"
#include "python/tensor_view.h"

namespace py = pybind11;

namespace percov2 {
namespace {

#if defined(PERCOV2_CUDA)

#if defined(PERCOV2_CUDA_EMULATION)  // in the tests, kernels run on the CPU
constexpr std::int32_t kDevice = dlpack::kCpu;
#else
constexpr std::int32_t kDevice = dlpack::kCuda;
#endif

// A tensor on a device; all tensors of a call are on the same one.
template <class Element>
class DeviceArray {
 public:
  DeviceArray(py::handle object, const char* name, std::int64_t ndim, std::optional<int>& device)
      : view_(object, name, kDevice), name_(name) {
    view_.require_ndim(ndim);
    if (device.value_or(view_.device()) != view_.device()) {
      throw py::value_error(std::string(name) + " is on device " + std::to_string(view_.device()) +
                            ", the tensors before it on device " + std::to_string(*device));
    }
    device = view_.device();
  }
  // Refuses any other number of elements along an axis.
  void require(std::int64_t axis, std::int64_t wanted) const {
    if (shape(axis) != wanted) {
      throw py::value_error(std::string(name_) + " has " + std::to_string(shape(axis)) +
                            " elements along axis " + std::to_string(axis) + "; it must have " +
                            std::to_string(wanted));
    }
  }
  std::int64_t shape(std::int64_t axis) const { return view_.shape(axis); }
  const Element* data() const { return view_.data(); }
  Element* output() const { return const_cast<Element*>(view_.data()); }

 private:
  TensorView<Element> view_;
  const char* name_;
};

bool cuda_built() { return true; }

py::tuple devices() {
  py::list names;
  for (const std::string& name : cuda_devices()) names.append(name);
  return py::tuple(names);
}

py::tuple encode_sizes(std::int64_t streams, std::int64_t symbols) {
  return py::make_tuple(encode_scratch_bytes(streams, symbols), packed_head_bytes(streams),
                        packed_most_bytes(streams, symbols));
}

void encode(py::handle starts, py::handle freqs, py::handle counts, py::handle checks,
            int prob_bits, py::handle scratch, py::handle packed, std::uintptr_t stream) {
  std::optional<int> device;
  const DeviceArray<std::int32_t> start(starts, "starts", 2, device);
  const DeviceArray<std::int32_t> freq(freqs, "freqs", 2, device);
  const DeviceArray<std::int32_t> check(checks, "checks", 1, device);
  const DeviceArray<std::uint8_t> working(scratch, "scratch", 1, device);
  const DeviceArray<std::uint8_t> result(packed, "packed", 1, device);
  std::optional<DeviceArray<std::int32_t>> count;
  const std::int64_t streams = start.shape(0), symbols = start.shape(1);
  freq.require(0, streams);
  freq.require(1, symbols);
  check.require(0, streams);
  working.require(0, encode_scratch_bytes(streams, symbols));
  if (!counts.is_none()) {
    count.emplace(counts, "counts", 1, device);
    count->require(0, streams);
  }
  const std::int64_t capacity = result.shape(0) - packed_head_bytes(streams);
  if (capacity < 0) throw py::value_error("packed is too small for its own head");
  const EncodeTask task = {streams,      symbols,          prob_bits,
                           start.data(), freq.data(),      count ? count->data() : nullptr,
                           check.data(), working.output(), result.output(),
                           capacity};
  const py::gil_scoped_release unlocked;
  encode_streams(task, {*device, reinterpret_cast<void*>(stream)});
}

void decode(py::handle logits, py::handle rows, py::handle bytes, py::handle offsets,
            py::handle states, py::handle positions, int prob_bits, py::handle symbols,
            py::handle status, std::uintptr_t stream) {
  std::optional<int> device;
  const DeviceArray<std::int16_t> logit(logits, "logits", 3, device);
  const DeviceArray<std::uint8_t> byte(bytes, "bytes", 1, device);
  const DeviceArray<std::int64_t> offset(offsets, "offsets", 1, device);
  const DeviceArray<std::int32_t> state(states, "states", 1, device);
  const DeviceArray<std::int64_t> position(positions, "positions", 1, device);
  const DeviceArray<std::int32_t> symbol(symbols, "symbols", 2, device);
  const DeviceArray<std::int32_t> found(status, "status", 1, device);
  std::optional<DeviceArray<std::int64_t>> row;
  const std::int64_t streams = rows.is_none() ? logit.shape(0) : state.shape(0);
  if (!rows.is_none()) {
    row.emplace(rows, "rows", 1, device);
    row->require(0, streams + 1);
    logit.require(0, 1);
  }
  offset.require(0, streams + 1);
  state.require(0, streams);
  position.require(0, streams);
  symbol.require(0, logit.shape(0));
  symbol.require(1, logit.shape(1));
  found.require(0, streams);
  const DecodeTask task = {streams,
                           logit.shape(1),
                           logit.shape(2),
                           prob_bits,
                           row ? row->data() : nullptr,
                           logit.data(),
                           byte.data(),
                           byte.shape(0),
                           offset.data(),
                           state.output(),
                           position.output(),
                           symbol.output(),
                           found.output()};
  const py::gil_scoped_release unlocked;
  decode_stage(task, {*device, reinterpret_cast<void*>(stream)});
}

#else

bool cuda_built() { return false; }

[[noreturn]] void explain() {
  throw std::runtime_error(
      "percov2's compiled module was built without CUDA: build it where nvcc is installed, with "
      "pip install --no-binary percov2 -C cmake.define.PERCOV2_CUDA=ON percov2");
}
py::tuple devices() { explain(); }
py::tuple encode_sizes(std::int64_t, std::int64_t) { explain(); }
void encode(py::handle, py::handle, py::handle, py::handle, int, py::handle, py::handle,
            std::uintptr_t) {
  explain();
}
void decode(py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, int, py::handle,
            py::handle, std::uintptr_t) {
  explain();
}

#endif

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_built", &cuda_built);
  module.def("cuda_devices", &devices);
  module.def("cuda_encode_sizes", &encode_sizes, py::arg("streams"), py::arg("symbols"));
  module.def("cuda_encode", &encode, py::arg("starts"), py::arg("freqs"), py::arg("counts"),
             py::arg("checks"), py::arg("prob_bits"), py::arg("scratch"), py::arg("packed"),
             py::arg("stream"));
  module.def("cuda_decode", &decode, py::arg("logits"), py::arg("rows"), py::arg("bytes"),
             py::arg("offsets"), py::arg("states"), py::arg("positions"), py::arg("prob_bits"),
             py::arg("symbols"), py::arg("status"), py::arg("stream"));
}

}  // namespace percov2
