// Thinning and matching of boundary maps at many thresholds, the compiled twin of what thinning.py and matching.py do with
// OpenCV and SciPy. It goes from the highest threshold to the lowest, so that pixels mostly arrive.

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "assignment.h"
#include "matcher.h"
#include "thinning.h"

namespace py = pybind11;

namespace {

using Map = py::array_t<bool, py::array::c_style>;
using Levels = py::array_t<int16_t, py::array::c_style>;

int32_t framed(int32_t pixel, int width) { return (pixel / width + 1) * (width + 2) + pixel % width + 1; }

py::array_t<bool> thin(const Map& mask) {
    const int height = mask.shape(0), width = mask.shape(1);
    py::array_t<bool> out({height, width});
    const bool* in = mask.data();
    bool* result = out.mutable_data();
    py::gil_scoped_release release;
    std::vector<uint8_t> map((height + 2) * static_cast<size_t>(width + 2), 0);
    std::vector<int32_t> set;
    for (int32_t i = 0; i < height * width; ++i)
        if (in[i]) {
            set.push_back(framed(i, width));
            map[set.back()] = 1;
        }
    Thinner(height, width).thin(map, set);
    for (int32_t i = 0; i < height * width; ++i) result[i] = map[framed(i, width)];
    return out;
}

void same_size(const Map& a, const py::array& b) {
    if (a.shape(0) != b.shape(0) || a.shape(1) != b.shape(1))
        throw std::invalid_argument("the maps differ in size");
}

// Thins the map at each of `num` thresholds, from the highest to the lowest, and calls `count(k, lines, map)` with the
// pixels that are left and their H x W picture; `arrived` is false where they are those of the threshold above.
// level (H, W): number of thresholds that each pixel passes, counted from the lowest.
template <typename Count>
void at_each_threshold(const int16_t* level, int height, int width, int num, Count count) {
    std::vector<std::vector<int32_t>> arriving(num + 1);                 // pixels whose last threshold is k - 1
    for (int32_t i = 0; i < height * width; ++i)
        if (level[i] > 0) arriving[level[i]].push_back(i);
    Thinner thinner(height, width);
    std::vector<uint8_t> map((height + 2) * static_cast<size_t>(width + 2), 0), thinned;      // with a frame
    std::vector<uint8_t> plain(static_cast<size_t>(height) * width, 0);                       // thinned, without it
    std::vector<int32_t> set, lines;
    for (int k = num - 1; k >= 0; --k) {
        for (const int32_t pixel : arriving[k + 1]) {
            set.push_back(framed(pixel, width));
            map[set.back()] = 1;
        }
        const bool arrived = !arriving[k + 1].empty();
        if (arrived) {
            thinned = map;
            thinner.thin(thinned, set);
            for (const int32_t pixel : lines) plain[pixel] = 0;
            lines.clear();
            for (const int32_t pixel : set)
                if (thinned[pixel]) {
                    const int32_t at = (pixel / (width + 2) - 1) * width + pixel % (width + 2) - 1;
                    lines.push_back(at);
                    plain[at] = 1;
                }
        }
        count(k, arrived, lines, plain);
    }
}

// Returns (num, 2): the most pairs, and pixels of the thinned map, at each threshold.
py::array_t<int64_t> count_levels(const Levels& levels, const Map& truth, int num, double distance) {
    same_size(truth, levels);
    const int height = levels.shape(0), width = levels.shape(1);
    py::array_t<int64_t> out({num, 2});
    int64_t* counts = out.mutable_data();
    const int16_t* level = levels.data();
    const bool* wanted = truth.data();
    py::gil_scoped_release release;
    Matcher matcher(wanted, height, width, distance);
    at_each_threshold(level, height, width, num, [&](int k, bool arrived, const auto& lines, const auto& map) {
        if (arrived) matcher.update(lines, map);
        counts[2 * k] = matcher.size();
        counts[2 * k + 1] = static_cast<int64_t>(lines.size());
    });
    return out;
}

// truths (G, H, W). Returns (num, 4): pairs of the cheapest maximum matchings with each of them, pixels of the thinned
// map that are in one of these pairs, all of its pixels, and the cost of the matchings, at each threshold.
py::array_t<int64_t> count_annotators(const Levels& levels, const Map& truths, int num, double distance) {
    const int height = levels.shape(0), width = levels.shape(1), annotators = truths.shape(0);
    if (truths.shape(1) != height || truths.shape(2) != width) throw std::invalid_argument("the maps differ in size");
    py::array_t<int64_t> out({num, 4});
    int64_t* counts = out.mutable_data();
    const int16_t* level = levels.data();
    const bool* wanted = truths.data();
    py::gil_scoped_release release;
    std::vector<Assignment> all;
    for (int g = 0; g < annotators; ++g)
        all.emplace_back(wanted + static_cast<size_t>(g) * height * width, height, width, distance);
    at_each_threshold(level, height, width, num, [&](int k, bool arrived, const auto& lines, const auto& map) {
        if (arrived)
            for (auto& one : all) one.update(lines, map);
        int64_t pairs = 0, matched = 0, cost = 0;
        for (const auto& one : all) {
            pairs += one.size();
            cost += one.cost();
        }
        for (const int32_t pixel : lines)
            matched += std::any_of(all.begin(), all.end(), [pixel](const Assignment& one) {
                return one.partner(pixel) != Assignment::ALONE;
            });
        const std::array<int64_t, 4> row{pairs, matched, static_cast<int64_t>(lines.size()), cost};
        std::copy(row.begin(), row.end(), counts + 4 * k);
    });
    return out;
}

// For each pixel of `prediction` (H, W) the flat index of its partner in `truth`, -1 without one. Matching: which of the
// maximum matchings it is, any (Matcher) or one with the least sum of distances (Assignment).
template <typename Matching>
py::array_t<int32_t> match(const Map& prediction, const Map& truth, double distance) {
    same_size(prediction, truth);
    const int height = prediction.shape(0), width = prediction.shape(1);
    py::array_t<int32_t> out({height, width});
    int32_t* partner = out.mutable_data();
    const bool *in = prediction.data(), *wanted = truth.data();
    py::gil_scoped_release release;
    std::vector<uint8_t> map(in, in + static_cast<size_t>(height) * width);
    std::vector<int32_t> set;
    for (int32_t i = 0; i < height * width; ++i)
        if (in[i]) set.push_back(i);
    Matching matching(wanted, height, width, distance);
    matching.update(set, map);
    for (int32_t i = 0; i < height * width; ++i) partner[i] = matching.partner(i);
    return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("thin", &thin);
    module.def("count_levels", &count_levels);
    module.def("count_annotators", &count_annotators);
    module.def("match", &match<Matcher>);
    module.def("cheapest_match", &match<Assignment>);
}
