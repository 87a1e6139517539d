// The integer token transformer for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "bindings.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace percov2 {
namespace {

// Arrays of a layer or a head by name, kept alive while the constructor reads them.
class Parameters {
 public:
  explicit Parameters(const py::dict& arrays) : arrays_(arrays) {}

  template <class Element>
  const Element* read(const std::string& name, std::initializer_list<std::int64_t> shape) {
    if (!arrays_.contains(name)) throw py::value_error("the entropy model has no " + name);
    names_.push_back(name);
    const auto view = std::make_shared<TensorView<Element>>(
        py::reinterpret_borrow<py::object>(arrays_[name.c_str()]), names_.back().c_str());
    views_.push_back(view);
    view->require_ndim(static_cast<std::int64_t>(shape.size()));
    std::int64_t axis = 0;
    for (const std::int64_t side : shape) same_size(name.c_str(), view->shape(axis++), side);
    return view->data();
  }

  LinearParameters linear(const std::string& name, std::int64_t outputs, std::int64_t terms) {
    return {read<std::int8_t>(name + ".weight", {outputs, terms}),
            read<std::int32_t>(name + ".bias", {outputs}),
            read<std::int8_t>(name + ".multiplier", {outputs}),
            read<std::int8_t>(name + ".shift", {outputs}),
            outputs,
            terms};
  }

 private:
  const py::dict& arrays_;
  std::list<std::string> names_;
  std::vector<std::shared_ptr<void>> views_;
};

IntegerLayer make_layer(const py::dict& arrays, std::int64_t dim, std::int64_t heads,
                        std::int64_t head_dim, std::int64_t hidden) {
  Parameters p(arrays);
  const std::int64_t inner = heads * head_dim;
  LayerParameters layer{};
  layer.dim = dim;
  layer.heads = heads;
  layer.head_dim = head_dim;
  layer.attention_gain = p.read<std::int16_t>("attention_norm.gain", {dim});
  layer.q = p.linear("q", inner, dim);
  layer.kv = p.linear("kv", 2 * inner, dim);
  layer.score_bias = p.read<std::int16_t>("attention.bias", {heads, 31 * 31 + 3});
  layer.score_shift = p.read<std::int8_t>("attention.shift", {heads});
  layer.gain_bits = *p.read<std::int8_t>("attention.gain_bits", {1});
  layer.out = p.linear("out", dim, inner);
  layer.mlp_gain = p.read<std::int16_t>("mlp_norm.gain", {dim});
  layer.up = p.linear("up", hidden, dim);
  layer.gelu = p.read<std::int8_t>("gelu", {256});
  layer.down = p.linear("down", dim, hidden);
  return IntegerLayer(layer);
}

IntegerHead make_head(const py::dict& arrays, std::int64_t dim, std::int64_t outputs) {
  Parameters p(arrays);
  const std::int16_t* gain = p.read<std::int16_t>("head_norm.gain", {dim});
  return IntegerHead(dim, gain, p.linear("head", outputs, dim));
}

py::tuple keys_values(const IntegerLayer& layer, py::handle residual, int threads) {
  const TensorView<std::int32_t> input(residual, "residual");
  input.require_ndim(3);
  same_size("residual's last axis", input.shape(2), layer.dim());
  const std::vector<py::ssize_t> shape{input.shape(0), input.shape(1), layer.inner()};
  py::array_t<std::int8_t> k(shape);
  py::array_t<std::int8_t> v(shape);
  std::int8_t* to_k = k.mutable_data();
  std::int8_t* to_v = v.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    layer.keys_values(input.data(), input.shape(0) * input.shape(1), threads, to_k, to_v);
  }
  return py::make_tuple(k, v);
}

struct EntryArrays {
  EntryArrays(const py::tuple& arrays, const char* name)
      : row(py::object(arrays[0]), name),
        column(py::object(arrays[1]), name),
        stage(py::object(arrays[2]), name) {
    for (const auto* view : {&row, &column, &stage}) {
      view->require_ndim(1);
      same_size(name, view->size(), row.size());
    }
  }
  EntryView view() const { return {row.data(), column.data(), stage.data(), row.size()}; }

  TensorView<std::int32_t> row, column, stage;
};

py::array_t<std::int32_t> advance_layer(const IntegerLayer& layer, py::handle residual,
                                        const py::tuple& readers, py::handle k, py::handle v,
                                        const py::tuple& keys, int threads) {
  const TensorView<std::int32_t> input(residual, "residual");
  const TensorView<std::int8_t> key(k, "k");
  const TensorView<std::int8_t> value(v, "v");
  const EntryArrays reading(readers, "readers");
  const EntryArrays read(keys, "keys");
  input.require_ndim(3);
  same_size("residual's last axis", input.shape(2), layer.dim());
  same_size("readers", reading.row.size(), input.shape(1));
  for (const auto* cache : {&key, &value}) {
    cache->require_ndim(3);
    same_size("k and v's first axis", cache->shape(0), input.shape(0));
    same_size("k and v's last axis", cache->shape(2), layer.inner());
    same_size("k and v's second axis", cache->shape(1), key.shape(1));
  }
  if (read.row.size() > key.shape(1)) {
    throw py::value_error("there are " + std::to_string(read.row.size()) + " keys but k holds " +
                          std::to_string(key.shape(1)));
  }
  py::array_t<std::int32_t> output({input.shape(0), input.shape(1), input.shape(2)});
  std::copy_n(input.data(), input.size(), output.mutable_data());
  std::int32_t* out = output.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    layer.advance(out, input.shape(0), reading.view(), key.data(), value.data(), key.shape(1),
                  read.view(), threads);
  }
  return output;
}

py::array_t<float> attention_weights_of(py::handle distances) {
  const TensorView<std::int32_t> distance(distances, "distances");
  distance.require_ndim(1);
  py::array_t<float> weights(distance.size());
  attention_weights(distance.data(), distance.size(), weights.mutable_data());
  return weights;
}

py::array_t<std::int16_t> logits_of(const IntegerHead& head, py::handle residual, int threads) {
  const TensorView<std::int32_t> input(residual, "residual");
  input.require_ndim(3);
  same_size("residual's last axis", input.shape(2), head.dim());
  py::array_t<std::int16_t> output({input.shape(0), input.shape(1), head.outputs()});
  std::int16_t* out = output.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    head.logits(input.data(), input.shape(0) * input.shape(1), threads, out);
  }
  return output;
}

}  // namespace

void bind_transformer(py::module_& module) {
  module.def("attention_weights", &attention_weights_of, py::arg("distances"));
  py::class_<IntegerLayer>(module, "IntegerLayer")
      .def(py::init(&make_layer), py::arg("arrays"), py::arg("dim"), py::arg("heads"),
           py::arg("head_dim"), py::arg("hidden"))
      .def("keys_values", &keys_values, py::arg("residual"), py::arg("threads"))
      .def("advance", &advance_layer, py::arg("residual"), py::arg("readers"), py::arg("k"),
           py::arg("v"), py::arg("keys"), py::arg("threads"));
  py::class_<IntegerHead>(module, "IntegerHead")
      .def(py::init(&make_head), py::arg("arrays"), py::arg("dim"), py::arg("outputs"))
      .def("logits", &logits_of, py::arg("residual"), py::arg("threads"));
}

}  // namespace percov2
