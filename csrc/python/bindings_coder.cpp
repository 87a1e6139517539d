// Intervals and rANS for Python.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "coder/coder.h"
#include "python/bindings.h"
#include "python/tensor_view.h"

namespace py = pybind11;

namespace percov2 {
namespace {

using Encoder = Shared<BatchEncoder>;
using Decoder = Shared<BatchDecoder>;

std::unique_ptr<Encoder> make_encoder(py::handle checks) {
  return std::make_unique<Encoder>(copy(TensorView<std::uint32_t>(checks, "checks")));
}

std::unique_ptr<Encoder> resume_encoder(py::handle buffer, py::handle offsets, py::handle quiet) {
  const TensorView<std::uint8_t> bytes(buffer, "buffer");
  bytes.require_ndim(1);
  return std::make_unique<Encoder>(bytes.data(), bytes.size(),
                                   copy(TensorView<std::int64_t>(offsets, "offsets")),
                                   copy(TensorView<std::int64_t>(quiet, "quiet")));
}

void push(Encoder& encoder, py::handle starts, py::handle freqs, py::handle counts, int prob_bits,
          int threads) {
  const TensorView<std::int32_t> start(starts, "starts");
  const TensorView<std::int32_t> freq(freqs, "freqs");
  const TensorView<std::int64_t> count(counts, "counts");
  start.require_ndim(1);
  freq.require_ndim(1);
  count.require_ndim(1);
  same_size("freqs", freq.size(), start.size());
  same_size("counts", count.size(), encoder.size());
  const Turn turn(encoder);
  const py::gil_scoped_release unlocked;
  encoder.push(start.data(), freq.data(), start.size(), count.data(), prob_bits, threads);
}

py::array_t<std::int64_t> symbols_before_output(Encoder& encoder) {
  const Turn turn(encoder);
  return to_array(encoder.symbols_before_output());
}

py::tuple finish(Encoder& encoder) {
  const Turn turn(encoder);
  const std::vector<std::int64_t> offsets = encoder.offsets();
  py::array_t<std::uint8_t> buffer(offsets.back());
  encoder.finish(buffer.mutable_data());
  return py::make_tuple(buffer, to_array(offsets));
}

std::unique_ptr<Decoder> make_decoder(py::handle buffer, py::handle offsets, py::handle states,
                                      py::handle positions) {
  std::vector<std::uint32_t> state;
  std::vector<std::int64_t> position;
  if (!states.is_none()) state = copy(TensorView<std::uint32_t>(states, "states"));
  if (!positions.is_none()) position = copy(TensorView<std::int64_t>(positions, "positions"));
  return std::make_unique<Decoder>(copy(TensorView<std::uint8_t>(buffer, "buffer")),
                                   copy(TensorView<std::int64_t>(offsets, "offsets")),
                                   !states.is_none(), std::move(state), position);
}

// Logits of any type of the quantizer.
class LogitsView {
 public:
  LogitsView(py::handle logits, const std::string& type, std::int64_t ndim) {
    if (type == "int16") {
      open(int16_, LogitType::kInt16, logits, ndim);
    } else if (type == "float32") {
      open(float32_, LogitType::kFloat32, logits, ndim);
    } else if (type == "bfloat16") {
      open(bfloat16_, LogitType::kBfloat16, logits, ndim);
    } else {
      throw py::value_error("logits have dtype " + type +
                            "; they must be int16, float32 or bfloat16");
    }
  }
  std::int64_t shape(std::size_t axis) const { return shape_.at(axis); }
  const Logits& logits() const { return logits_; }

 private:
  template <class Element>
  void open(std::optional<TensorView<Element>>& view, LogitType type, py::handle logits,
            std::int64_t ndim) {
    view.emplace(logits, "logits");
    view->require_ndim(ndim);
    for (std::int64_t axis = 0; axis < ndim; ++axis) shape_.push_back(view->shape(axis));
    logits_ = {view->data(), type, shape_.back()};
  }

  std::optional<TensorView<std::int16_t>> int16_;
  std::optional<TensorView<float>> float32_;
  std::optional<TensorView<Bfloat16>> bfloat16_;
  std::vector<std::int64_t> shape_;
  Logits logits_{};
};

py::array_t<std::int32_t> decode_logits(Decoder& decoder, py::handle logits,
                                        const std::string& type, py::handle streams, int prob_bits,
                                        int threads) {
  const LogitsView logit(logits, type, 3);
  const TensorView<std::int64_t> stream(streams, "streams");
  stream.require_ndim(1);
  same_size("streams", stream.size(), logit.shape(0));
  py::array_t<std::int32_t> symbols({logit.shape(0), logit.shape(1)});
  std::int32_t* out = symbols.mutable_data();
  const Turn turn(decoder);
  const py::gil_scoped_release unlocked;
  decoder.decode_logits(logit.logits(), stream.data(), logit.shape(0), logit.shape(1), prob_bits,
                        threads, out);
  return symbols;
}

py::array_t<std::int32_t> decode_cdf(Decoder& decoder, py::handle cdf, py::handle streams,
                                     int prob_bits, bool trusted, int threads) {
  const TensorView<std::int32_t> table(cdf, "cdf");
  const TensorView<std::int64_t> stream(streams, "streams");
  table.require_ndim(3);
  stream.require_ndim(1);
  same_size("streams", stream.size(), table.shape(0));
  py::array_t<std::int32_t> symbols({table.shape(0), table.shape(1)});
  std::int32_t* out = symbols.mutable_data();
  const Turn turn(decoder);
  const py::gil_scoped_release unlocked;
  decoder.decode_cdf(table.data(), stream.data(), table.shape(0), table.shape(1),
                     table.shape(2) - 1, prob_bits, trusted, threads, out);
  return symbols;
}

py::array_t<std::uint32_t> states(Decoder& decoder) {
  const Turn turn(decoder);
  return to_array(decoder.states());
}

py::array_t<std::int64_t> positions(Decoder& decoder) {
  const Turn turn(decoder);
  return to_array(decoder.positions());
}

py::array_t<bool> exhausted(Decoder& decoder) {
  const Turn turn(decoder);
  py::array_t<bool> result(decoder.size());
  for (std::int64_t b = 0; b < decoder.size(); ++b) result.mutable_at(b) = decoder.exhausted(b);
  return result;
}

py::array_t<bool> finished(Decoder& decoder, py::handle checks) {
  const TensorView<std::uint32_t> check(checks, "checks");
  check.require_ndim(1);
  same_size("checks", check.size(), decoder.size());
  const Turn turn(decoder);
  py::array_t<bool> result(decoder.size());
  for (std::int64_t b = 0; b < decoder.size(); ++b) {
    result.mutable_at(b) = decoder.finished(b, check.data()[b]);
  }
  return result;
}

py::tuple intervals_of(py::handle logits, const std::string& type, py::handle symbols,
                       int prob_bits, int threads) {
  const LogitsView logit(logits, type, 2);
  const TensorView<std::int32_t> symbol(symbols, "symbols");
  symbol.require_ndim(1);
  same_size("symbols", symbol.size(), logit.shape(0));
  py::array_t<std::int32_t> starts(logit.shape(0));
  py::array_t<std::int32_t> freqs(logit.shape(0));
  std::int32_t* start = starts.mutable_data();
  std::int32_t* freq = freqs.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    intervals(logit.logits(), symbol.data(), logit.shape(0), prob_bits, threads, start, freq);
  }
  return py::make_tuple(starts, freqs);
}

py::array_t<std::int32_t> cdf_of(py::handle logits, const std::string& type, int prob_bits,
                                 int threads) {
  const LogitsView logit(logits, type, 2);
  check_codebook(logit.shape(1), prob_bits);  // before a table of that size is allocated
  py::array_t<std::int32_t> table({logit.shape(0), logit.shape(1) + 1});
  std::int32_t* out = table.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    cdf_table(logit.logits(), logit.shape(0), prob_bits, threads, out);
  }
  return table;
}

}  // namespace

void bind_coder(py::module_& module) {
  module.def("weight_table", [] { return py::array_t<std::uint32_t>(256, weight_table()); });
  module.def("intervals", &intervals_of, py::arg("logits"), py::arg("type"), py::arg("symbols"),
             py::arg("prob_bits"), py::arg("threads"));
  module.def("cdf", &cdf_of, py::arg("logits"), py::arg("type"), py::arg("prob_bits"),
             py::arg("threads"));
  py::class_<Encoder>(module, "BatchEncoder")
      .def(py::init(&make_encoder), py::arg("checks"))
      .def("push", &push, py::arg("starts"), py::arg("freqs"), py::arg("counts"),
           py::arg("prob_bits"), py::arg("threads"))
      .def("symbols_before_output", &symbols_before_output)
      .def("finish", &finish);
  module.def("resume_encoder", &resume_encoder, py::arg("buffer"), py::arg("offsets"),
             py::arg("quiet"));
  py::class_<Decoder>(module, "BatchDecoder")
      .def(py::init(&make_decoder), py::arg("buffer"), py::arg("offsets"), py::arg("states"),
           py::arg("positions"))
      .def("decode_logits", &decode_logits, py::arg("logits"), py::arg("type"), py::arg("streams"),
           py::arg("prob_bits"), py::arg("threads"))
      .def("decode_cdf", &decode_cdf, py::arg("cdf"), py::arg("streams"), py::arg("prob_bits"),
           py::arg("trusted"), py::arg("threads"))
      .def("states", &states)
      .def("positions", &positions)
      .def("exhausted", &exhausted)
      .def("finished", &finished, py::arg("checks"));
}

}  // namespace percov2
