// The integer token transformer for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "python/bindings.h"
#include "python/tensor_view.h"
#include "transformer/transformer.h"

namespace py = pybind11;

template <>
class pybind11::detail::type_caster<percov2::IntegerTransformer>
    : public percov2::InitialisedCaster<percov2::IntegerTransformer> {};

namespace percov2 {
namespace {

using Staged = Shared<StagedPass>;

// Arrays of a model by name, kept alive while the constructor reads them.
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

LayerParameters layer_parameters(Parameters& p, const std::string& prefix, std::int64_t dim,
                                 std::int64_t heads, std::int64_t head_dim, std::int64_t hidden) {
  const std::int64_t inner = heads * head_dim;
  LayerParameters layer{};
  layer.attention_gain = p.read<std::int16_t>(prefix + "attention_norm.gain", {dim});
  layer.q = p.linear(prefix + "q", inner, dim);
  layer.kv = p.linear(prefix + "kv", 2 * inner, dim);
  layer.score_bias =
      p.read<std::int16_t>(prefix + "attention.bias", {heads, kWindow * kWindow + kStartEntries});
  layer.score_shift = p.read<std::int8_t>(prefix + "attention.shift", {heads});
  layer.gain_bits = *p.read<std::int8_t>(prefix + "attention.gain_bits", {1});
  layer.out = p.linear(prefix + "out", dim, inner);
  layer.mlp_gain = p.read<std::int16_t>(prefix + "mlp_norm.gain", {dim});
  layer.up = p.linear(prefix + "up", hidden, dim);
  layer.gelu = p.read<std::int8_t>(prefix + "gelu", {256});
  layer.down = p.linear(prefix + "down", dim, hidden);
  return layer;
}

std::unique_ptr<IntegerTransformer> make_transformer(const py::dict& arrays, std::int64_t codebook,
                                                     std::int64_t dim, std::int64_t heads,
                                                     std::int64_t head_dim, std::int64_t layers,
                                                     std::int64_t hidden) {
  Parameters p(arrays);
  TransformerParameters all{};
  all.codebook = codebook;
  all.dim = dim;
  all.heads = heads;
  all.head_dim = head_dim;
  all.token = p.read<std::int16_t>("embedding.token", {codebook, dim});
  all.query = p.read<std::int16_t>("embedding.query", {dim});
  all.row = p.read<std::int16_t>("embedding.row", {16, dim});
  all.column = p.read<std::int16_t>("embedding.column", {16, dim});
  all.start = p.read<std::int16_t>("embedding.start", {kStartEntries, dim});
  all.height = p.read<std::int16_t>("embedding.height", {17, dim});
  all.width = p.read<std::int16_t>("embedding.width", {17, dim});
  for (std::int64_t i = 0; i < layers; ++i) {
    const std::string prefix = "layers." + std::to_string(i) + ".";
    all.layers.push_back(layer_parameters(p, prefix, dim, heads, head_dim, hidden));
  }
  all.head_gain = p.read<std::int16_t>("head_norm.gain", {dim});
  all.head = p.linear("head", codebook, dim);
  return std::make_unique<IntegerTransformer>(all);
}

py::array_t<std::int16_t> logits_of(const IntegerTransformer& model, py::handle residual,
                                    int threads) {
  const TensorView<std::int32_t> input(residual, "residual");
  input.require_ndim(3);
  same_size("residual's last axis", input.shape(2), model.dim());
  py::array_t<std::int16_t> output({input.shape(0), input.shape(1), model.codebook()});
  std::int16_t* out = output.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    model.logits(input.data(), input.shape(0) * input.shape(1), threads, out);
  }
  return output;
}

py::array_t<std::int32_t> encode(const IntegerTransformer& model, py::handle stages,
                                 py::handle tokens, int threads) {
  const TensorView<std::int32_t> map(stages, "stages");
  const TensorView<std::int32_t> input(tokens, "tokens");
  map.require_ndim(2);
  input.require_ndim(3);
  same_size("tokens' second axis", input.shape(1), map.shape(0));
  same_size("tokens' last axis", input.shape(2), map.shape(1));
  const TokenPass pass(model, map.data(), map.shape(0), map.shape(1));
  py::array_t<std::int32_t> output({input.shape(0), pass.grid().positions(), model.dim()});
  std::int32_t* out = output.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    pass.encode(input.data(), input.shape(0), threads, out);
  }
  return output;
}

std::unique_ptr<Staged> make_staged(const IntegerTransformer& model, py::handle stages,
                                    std::int64_t batch) {
  const TensorView<std::int32_t> map(stages, "stages");
  map.require_ndim(2);
  return std::make_unique<Staged>(model, map.data(), map.shape(0), map.shape(1), batch);
}

py::array_t<std::int32_t> staged_residual(Staged& pass, int threads) {
  const Turn turn(pass);
  py::array_t<std::int32_t> output({pass.batch(), pass.next_count(), pass.model().dim()});
  std::int32_t* out = output.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    pass.decode(threads, out);
  }
  return output;
}

void accept_tokens(Staged& pass, py::handle tokens) {
  const TensorView<std::int32_t> input(tokens, "tokens");
  input.require_ndim(2);
  const Turn turn(pass);
  same_size("tokens' first axis", input.shape(0), pass.batch());
  same_size("tokens' last axis", input.shape(1), pass.next_count());
  pass.accept(input.data());
}

py::array_t<std::int32_t> tokens_of(Staged& pass) {
  const Turn turn(pass);
  py::array_t<std::int32_t> output({pass.batch(), pass.grid().height(), pass.grid().width()});
  std::copy_n(pass.tokens(), output.size(), output.mutable_data());
  return output;
}

py::array_t<std::uint8_t> attention_weights_of(py::handle distances) {
  const TensorView<std::int32_t> distance(distances, "distances");
  distance.require_ndim(1);
  for (std::int64_t i = 0; i < distance.size(); ++i) {
    if (distance.data()[i] < 0) throw std::invalid_argument("distances must not be negative");
  }
  py::array_t<std::uint8_t> weights(distance.size());
  attention_kernels().weigh(distance.data(), distance.size(), weights.mutable_data());
  return weights;
}

}  // namespace

void bind_transformer(py::module_& module) {
  module.def("attention_weights", &attention_weights_of, py::arg("distances"));
  py::class_<IntegerTransformer>(module, "IntegerTransformer")
      .def(py::init(&make_transformer), py::arg("arrays"), py::arg("codebook_size"), py::arg("dim"),
           py::arg("heads"), py::arg("head_dim"), py::arg("layers"), py::arg("hidden"))
      .def("logits", &logits_of, py::arg("residual"), py::arg("threads"))
      .def("encode", &encode, py::arg("stages"), py::arg("tokens"), py::arg("threads"));
  py::class_<Staged>(module, "StagedPass")
      .def(py::init(&make_staged), py::arg("model"), py::arg("stages"), py::arg("batch"),
           py::keep_alive<1, 2>())
      .def("residual", &staged_residual, py::arg("threads"))
      .def("accept", &accept_tokens, py::arg("tokens"))
      .def("tokens", &tokens_of);
}

}  // namespace percov2
