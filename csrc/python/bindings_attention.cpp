// One layer's attention for Python, for measurements and tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "python/bindings.h"
#include "python/tensor_view.h"
#include "support/aligned_array.h"
#include "transformer/attention.h"

namespace py = pybind11;

namespace percov2 {
namespace {

// Entries of one pass over all stages: start entries, contents of all stages but the last, then
// queries of all positions. Positions are in coding order.
struct PassEntries {
  explicit PassEntries(const StageGrid& grid)
      : known(grid.ends()[static_cast<std::size_t>(grid.stages() - 1)]) {
    for (std::int64_t s = 0; s < kStartEntries; ++s) sights.push_back(StageGrid::start_sight());
    for (std::int64_t i = 0; i < known; ++i) sights.push_back(grid.content_sight(at(grid, i)));
    for (std::int64_t i = 0; i < grid.positions(); ++i) {
      sights.push_back(grid.query_sight(at(grid, i)));
    }
  }

  static std::int32_t at(const StageGrid& grid, std::int64_t i) {
    return grid.order()[static_cast<std::size_t>(i)];
  }
  std::int64_t keys() const { return kStartEntries + known; }
  std::int64_t count() const { return static_cast<std::int64_t>(sights.size()); }

  std::int64_t known;
  std::vector<Sight> sights;
};

py::array_t<std::int8_t> stage_attention(py::handle stages, py::handle bias, py::handle shift,
                                         int gain_bits, py::handle q, py::handle kv) {
  const TensorView<std::int32_t> map(stages, "stages");
  const TensorView<std::int16_t> biases(bias, "bias");
  const TensorView<std::int8_t> shifts(shift, "shift");
  const TensorView<std::int8_t> queries(q, "q");
  const TensorView<std::int8_t> pairs(kv, "kv");
  map.require_ndim(2);
  biases.require_ndim(2);
  shifts.require_ndim(1);
  queries.require_ndim(3);
  pairs.require_ndim(3);
  const std::int64_t heads = biases.shape(0), inner = queries.shape(2), batch = queries.shape(0);
  same_size("bias's last axis", biases.shape(1), kWindow * kWindow + kStartEntries);
  same_size("shift", shifts.size(), heads);
  if (heads < 1 || inner % heads != 0 || inner / heads % kDimQuad != 0) {
    throw py::value_error("q's last axis must be heads * head_dim, head_dim a multiple of 4");
  }
  const StageGrid grid(map.data(), map.shape(0), map.shape(1));
  const PassEntries entries(grid);
  const KeyLayout layout(grid, heads, inner / heads);
  const ScoreTables scores(biases.data(), shifts.data(), gain_bits, heads);
  same_size("q's second axis", queries.shape(1), entries.count());
  same_size("kv's first axis", pairs.shape(0), batch);
  same_size("kv's second axis", pairs.shape(1), entries.keys());
  same_size("kv's last axis", pairs.shape(2), 2 * inner);
  py::array_t<std::int8_t> output({batch, entries.count(), inner});
  std::int8_t* out = output.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    AlignedArray<std::int8_t> memory(layout.bytes());
    for (std::int64_t b = 0; b < batch; ++b) {
      const std::int8_t* pair = pairs.data() + b * entries.keys() * 2 * inner;
      for (std::int64_t i = 0; i < entries.keys(); ++i) {
        const std::int64_t position =
            i < kStartEntries ? -1 - i : PassEntries::at(grid, i - kStartEntries);
        layout.store(grid, position, pair + i * 2 * inner, memory.data());
      }
      const std::int64_t image = b * entries.count() * inner;
      for (std::int64_t h = 0; h < heads; ++h) {
        const std::int64_t at = image + h * (inner / heads);
        std::vector<Reader> readers;
        for (std::int64_t i = 0; i < entries.count(); ++i) {
          readers.push_back({entries.sights[static_cast<std::size_t>(i)],
                             queries.data() + at + i * inner, out + at + i * inner});
        }
        attention_kernels().attend(layout.head(grid, memory.data(), h), scores.head(h),
                                   readers.data(), entries.count());
      }
    }
  }
  return output;
}

}  // namespace

void bind_attention(py::module_& module) {
  module.def("stage_attention", &stage_attention, py::arg("stages"), py::arg("bias"),
             py::arg("shift"), py::arg("gain_bits"), py::arg("q"), py::arg("kv"));
}

}  // namespace percov2
