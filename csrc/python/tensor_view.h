// Borrowed views of arrays that Python owns, by the buffer protocol (numpy) or DLPack (torch and
// others). They copy nothing, keep nothing beyond their life, and do not need libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace percov2 {

// The parts of the DLPack 0.x ABI in use (https://dmlc.github.io/dlpack).
namespace dlpack {
struct Device {
  std::int32_t type;
  std::int32_t id;
};
struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ManagedTensor {
  Tensor tensor;
  void* manager;
  void (*deleter)(ManagedTensor*);
};
constexpr std::int32_t kCpu = 1;
constexpr std::int32_t kCuda = 2;
constexpr std::uint8_t kInt = 0;
constexpr std::uint8_t kUInt = 1;
constexpr std::uint8_t kFloat = 2;
constexpr std::uint8_t kBfloat = 4;
}  // namespace dlpack

// A stored bfloat16 number. Only DLPack has a name for it.
struct Bfloat16 {
  std::uint16_t bits;
};

// The names of an element: letters of the buffer protocol, DLPack's type code, and the name in
// error messages.
template <class Element>
struct ElementNames {
  static constexpr bool kSigned = static_cast<Element>(-1) < static_cast<Element>(0);
  // Sizes come from itemsize: 'l' and 'q' are equal on some systems only.
  static constexpr const char* kLetters = kSigned ? "bhilq" : "BHILQ";
  static constexpr std::uint8_t kCode = kSigned ? dlpack::kInt : dlpack::kUInt;
  static std::string name() {
    return (kSigned ? "int" : "uint") + std::to_string(8 * sizeof(Element));
  }
};
template <>
struct ElementNames<float> {
  static constexpr const char* kLetters = "f";
  static constexpr std::uint8_t kCode = dlpack::kFloat;
  static std::string name() { return "float32"; }
};
template <>
struct ElementNames<Bfloat16> {
  static constexpr const char* kLetters = "";
  static constexpr std::uint8_t kCode = dlpack::kBfloat;
  static std::string name() { return "bfloat16"; }
};

// An aligned C-contiguous read-only array of `Element` on the CPU, or on a device by DLPack. Throws
// pybind11::value_error with the argument's name for anything else. Create and destroy it with the
// interpreter lock held.
template <class Element>
class TensorView {
 public:
  TensorView(pybind11::handle object, const char* name, std::int32_t device_type = dlpack::kCpu)
      : name_(name), device_type_(device_type) {
    if (device_type == dlpack::kCpu && PyObject_CheckBuffer(object.ptr())) {
      borrow_buffer(object);
    } else if (pybind11::hasattr(object, "__dlpack__")) {
      borrow_dlpack(object);
    } else {
      fail("is neither an array with the buffer protocol nor a DLPack tensor");
    }
    if (data_ == nullptr && size() != 0) fail("is a tensor without data");
    if (reinterpret_cast<std::uintptr_t>(data_) % alignof(Element) != 0) {
      fail("does not begin at a multiple of its element size in memory; copy it first");
    }
  }
  TensorView(const TensorView&) = delete;
  TensorView& operator=(const TensorView&) = delete;
  ~TensorView() { release(); }

  const Element* data() const { return data_; }
  // Ordinal of the array's device.
  int device() const { return device_; }
  std::int64_t ndim() const { return static_cast<std::int64_t>(shape_.size()); }
  std::int64_t shape(std::int64_t axis) const { return shape_.at(static_cast<std::size_t>(axis)); }
  std::int64_t size() const {
    std::int64_t product = 1;
    for (const std::int64_t side : shape_) product *= side;
    return product;
  }
  // Refuses any other number of axes.
  void require_ndim(std::int64_t wanted) const {
    if (ndim() != wanted) {
      refuse("has " + std::to_string(ndim()) + " axes; it must have " + std::to_string(wanted));
    }
  }

 private:
  using Names = ElementNames<Element>;
  static constexpr int kBits = 8 * static_cast<int>(sizeof(Element));

  [[noreturn]] void refuse(const std::string& reason) const {
    throw pybind11::value_error(std::string(name_) + " " + reason);
  }
  [[noreturn]] void fail(const std::string& reason) {
    release();
    refuse(reason);
  }
  void release() {
    if (has_buffer_) PyBuffer_Release(&buffer_);
    if (managed_ != nullptr && managed_->deleter != nullptr) managed_->deleter(managed_);
    has_buffer_ = false;
    managed_ = nullptr;
  }

  void borrow_buffer(pybind11::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      fail("is not C-contiguous");
    }
    has_buffer_ = true;
    const std::string format = buffer_.format == nullptr ? "B" : buffer_.format;
    if (format.size() != 1 || std::string(Names::kLetters).find(format) == std::string::npos ||
        buffer_.itemsize != static_cast<Py_ssize_t>(sizeof(Element))) {
      fail("has element type '" + format + "'; it must be " + Names::name());
    }
    data_ = static_cast<const Element*>(buffer_.buf);
    for (int axis = 0; axis < buffer_.ndim; ++axis) shape_.push_back(buffer_.shape[axis]);
  }

  void borrow_dlpack(pybind11::handle object) {
    // -1: no synchronisation. Kernels run on their caller's stream.
    pybind11::object capsule = device_type_ == dlpack::kCpu
                                   ? object.attr("__dlpack__")()
                                   : object.attr("__dlpack__")(pybind11::arg("stream") = -1);
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), "dltensor");
    if (pointer == nullptr) throw pybind11::error_already_set();
    managed_ = static_cast<dlpack::ManagedTensor*>(pointer);
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");  // now release() owns it
    const dlpack::Tensor& tensor = managed_->tensor;
    if (tensor.device.type != device_type_) {
      fail(device_type_ == dlpack::kCpu ? "is not on the CPU; move it there first"
                                        : "is not on a CUDA device; move it there first");
    }
    device_ = tensor.device.id;
    if (tensor.dtype.code != Names::kCode || tensor.dtype.bits != kBits ||
        tensor.dtype.lanes != 1) {
      fail("has another element type; it must be " + Names::name());
    }
    shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
    if (tensor.strides != nullptr && size() > 0) {
      std::int64_t expected = 1;
      for (std::int32_t axis = tensor.ndim - 1; axis >= 0; --axis) {
        if (tensor.shape[axis] != 1 && tensor.strides[axis] != expected) {
          fail("is not C-contiguous");
        }
        expected *= tensor.shape[axis];
      }
    }
    data_ = reinterpret_cast<const Element*>(static_cast<const char*>(tensor.data) +
                                             tensor.byte_offset);
  }

  const char* name_;
  std::int32_t device_type_;
  int device_ = 0;
  const Element* data_ = nullptr;
  std::vector<std::int64_t> shape_;
  Py_buffer buffer_{};
  bool has_buffer_ = false;
  dlpack::ManagedTensor* managed_ = nullptr;
};

}  // namespace percov2
