// The compiled module percov2._native. Python arrays in (borrowed), numpy arrays out; the
// interpreter lock is released while the coder works. std::invalid_argument becomes ValueError.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "coder.h"
#include "tensor_view.h"
#include "transformer.h"

namespace py = pybind11;

namespace percov2 {
namespace {

template <class Element>
std::vector<Element> copy(const TensorView<Element>& view) {
  view.require_ndim(1);
  return std::vector<Element>(view.data(), view.data() + view.size());
}

template <class Element>
py::array_t<Element> to_array(const std::vector<Element>& values) {
  return py::array_t<Element>(static_cast<py::ssize_t>(values.size()), values.data());
}

void same_size(const char* name, std::int64_t size, std::int64_t wanted) {
  if (size != wanted) {
    throw py::value_error(std::string(name) + " has " + std::to_string(size) +
                          " elements; it must have " + std::to_string(wanted));
  }
}

BatchEncoder make_encoder(py::handle checks) {
  return BatchEncoder(copy(TensorView<std::uint32_t>(checks, "checks")));
}

void push(BatchEncoder& encoder, py::handle starts, py::handle freqs, py::handle counts,
          int prob_bits, int threads) {
  const TensorView<std::int32_t> start(starts, "starts");
  const TensorView<std::int32_t> freq(freqs, "freqs");
  const TensorView<std::int64_t> count(counts, "counts");
  start.require_ndim(1);
  freq.require_ndim(1);
  count.require_ndim(1);
  same_size("freqs", freq.size(), start.size());
  same_size("counts", count.size(), encoder.size());
  const py::gil_scoped_release unlocked;
  encoder.push(start.data(), freq.data(), start.size(), count.data(), prob_bits, threads);
}

py::tuple finish(const BatchEncoder& encoder) {
  std::vector<std::uint8_t> buffer;
  std::vector<std::int64_t> offsets;
  encoder.finish(buffer, offsets);
  return py::make_tuple(to_array(buffer), to_array(offsets));
}

BatchDecoder make_decoder(py::handle buffer, py::handle offsets, py::handle states,
                          py::handle positions) {
  std::vector<std::uint32_t> state;
  std::vector<std::int64_t> position;
  if (!states.is_none()) state = copy(TensorView<std::uint32_t>(states, "states"));
  if (!positions.is_none()) position = copy(TensorView<std::int64_t>(positions, "positions"));
  return BatchDecoder(copy(TensorView<std::uint8_t>(buffer, "buffer")),
                      copy(TensorView<std::int64_t>(offsets, "offsets")), !states.is_none(),
                      std::move(state), position);
}

py::array_t<std::int32_t> decode_logits(BatchDecoder& decoder, py::handle logits,
                                        py::handle streams, int prob_bits, int threads) {
  const TensorView<std::int16_t> logit(logits, "logits");
  const TensorView<std::int64_t> stream(streams, "streams");
  logit.require_ndim(3);
  stream.require_ndim(1);
  same_size("streams", stream.size(), logit.shape(0));
  py::array_t<std::int32_t> symbols({logit.shape(0), logit.shape(1)});
  std::int32_t* out = symbols.mutable_data();
  const py::gil_scoped_release unlocked;
  decoder.decode_logits(logit.data(), stream.data(), logit.shape(0), logit.shape(1), logit.shape(2),
                        prob_bits, threads, out);
  return symbols;
}

py::array_t<std::int32_t> decode_cdf(BatchDecoder& decoder, py::handle cdf, py::handle streams,
                                     int prob_bits, int threads) {
  const TensorView<std::int32_t> table(cdf, "cdf");
  const TensorView<std::int64_t> stream(streams, "streams");
  table.require_ndim(3);
  stream.require_ndim(1);
  same_size("streams", stream.size(), table.shape(0));
  py::array_t<std::int32_t> symbols({table.shape(0), table.shape(1)});
  std::int32_t* out = symbols.mutable_data();
  const py::gil_scoped_release unlocked;
  decoder.decode_cdf(table.data(), stream.data(), table.shape(0), table.shape(1),
                     table.shape(2) - 1, prob_bits, threads, out);
  return symbols;
}

py::array_t<bool> exhausted(const BatchDecoder& decoder) {
  py::array_t<bool> result(decoder.size());
  for (std::int64_t b = 0; b < decoder.size(); ++b) result.mutable_at(b) = decoder.exhausted(b);
  return result;
}

py::array_t<bool> finished(const BatchDecoder& decoder, py::handle checks) {
  const TensorView<std::uint32_t> check(checks, "checks");
  check.require_ndim(1);
  same_size("checks", check.size(), decoder.size());
  py::array_t<bool> result(decoder.size());
  for (std::int64_t b = 0; b < decoder.size(); ++b) {
    result.mutable_at(b) = decoder.finished(b, check.data()[b]);
  }
  return result;
}

py::tuple intervals_of(py::handle logits, py::handle symbols, int prob_bits, int threads) {
  const TensorView<std::int16_t> logit(logits, "logits");
  const TensorView<std::int32_t> symbol(symbols, "symbols");
  logit.require_ndim(2);
  symbol.require_ndim(1);
  same_size("symbols", symbol.size(), logit.shape(0));
  py::array_t<std::int32_t> starts(logit.shape(0));
  py::array_t<std::int32_t> freqs(logit.shape(0));
  std::int32_t* start = starts.mutable_data();
  std::int32_t* freq = freqs.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    intervals(logit.data(), symbol.data(), logit.shape(0), logit.shape(1), prob_bits, threads,
              start, freq);
  }
  return py::make_tuple(starts, freqs);
}

py::array_t<std::int32_t> cdf_of(py::handle logits, int prob_bits, int threads) {
  const TensorView<std::int16_t> logit(logits, "logits");
  logit.require_ndim(2);
  check_codebook(logit.shape(1), prob_bits);  // before a table of that size is allocated
  py::array_t<std::int32_t> table({logit.shape(0), logit.shape(1) + 1});
  std::int32_t* out = table.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    cdf_table(logit.data(), logit.shape(0), logit.shape(1), prob_bits, threads, out);
  }
  return table;
}

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
}  // namespace percov2

PYBIND11_MODULE(_native, module) {
  using percov2::BatchDecoder;
  using percov2::BatchEncoder;
  using percov2::IntegerHead;
  using percov2::IntegerLayer;
  module.doc() = "Compiled parts of percov2; use them through percov2.entropy.";
  module.def("weight_table",
             [] { return py::array_t<std::uint32_t>(256, percov2::weight_table()); });
  module.def("intervals", &percov2::intervals_of, py::arg("logits"), py::arg("symbols"),
             py::arg("prob_bits"), py::arg("threads"));
  module.def("cdf", &percov2::cdf_of, py::arg("logits"), py::arg("prob_bits"), py::arg("threads"));
  module.def("attention_weights", &percov2::attention_weights_of, py::arg("distances"));
  py::class_<BatchEncoder>(module, "BatchEncoder")
      .def(py::init(&percov2::make_encoder), py::arg("checks"))
      .def("push", &percov2::push, py::arg("starts"), py::arg("freqs"), py::arg("counts"),
           py::arg("prob_bits"), py::arg("threads"))
      .def("symbols_before_output",
           [](const BatchEncoder& e) { return percov2::to_array(e.symbols_before_output()); })
      .def("finish", &percov2::finish);
  py::class_<BatchDecoder>(module, "BatchDecoder")
      .def(py::init(&percov2::make_decoder), py::arg("buffer"), py::arg("offsets"),
           py::arg("states"), py::arg("positions"))
      .def("decode_logits", &percov2::decode_logits, py::arg("logits"), py::arg("streams"),
           py::arg("prob_bits"), py::arg("threads"))
      .def("decode_cdf", &percov2::decode_cdf, py::arg("cdf"), py::arg("streams"),
           py::arg("prob_bits"), py::arg("threads"))
      .def("states", [](const BatchDecoder& d) { return percov2::to_array(d.states()); })
      .def("positions", [](const BatchDecoder& d) { return percov2::to_array(d.positions()); })
      .def("exhausted", &percov2::exhausted)
      .def("finished", &percov2::finished, py::arg("checks"));
  py::class_<IntegerLayer>(module, "IntegerLayer")
      .def(py::init(&percov2::make_layer), py::arg("arrays"), py::arg("dim"), py::arg("heads"),
           py::arg("head_dim"), py::arg("hidden"))
      .def("keys_values", &percov2::keys_values, py::arg("residual"), py::arg("threads"))
      .def("advance", &percov2::advance_layer, py::arg("residual"), py::arg("readers"),
           py::arg("k"), py::arg("v"), py::arg("keys"), py::arg("threads"));
  py::class_<IntegerHead>(module, "IntegerHead")
      .def(py::init(&percov2::make_head), py::arg("arrays"), py::arg("dim"), py::arg("outputs"))
      .def("logits", &percov2::logits_of, py::arg("residual"), py::arg("threads"));
}
