// Thinning and matching of boundary maps at many thresholds, the compiled twin of what matching.py does with
// scikit-image and SciPy. It goes from the highest threshold to the lowest, so that pixels mostly arrive.

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

// levels (H, W): number of thresholds that each pixel passes, of `num`, counted from the lowest. Returns (num, 2):
// matched pairs, and pixels of the thinned map, at each threshold.
py::array_t<int64_t> count_levels(const Levels& levels, const Map& truth, int num, double distance) {
    const int height = levels.shape(0), width = levels.shape(1);
    if (truth.shape(0) != height || truth.shape(1) != width)
        throw std::invalid_argument("levels and truth differ in size");
    py::array_t<int64_t> out({num, 2});
    int64_t* counts = out.mutable_data();
    const int16_t* level = levels.data();
    const bool* wanted = truth.data();
    py::gil_scoped_release release;
    std::vector<std::vector<int32_t>> arriving(num + 1);                 // pixels whose last threshold is k - 1
    for (int32_t i = 0; i < height * width; ++i)
        if (level[i] > 0) arriving[level[i]].push_back(i);
    Thinner thinner(height, width);
    Matcher matcher(wanted, height, width, distance);
    std::vector<uint8_t> map((height + 2) * static_cast<size_t>(width + 2), 0), thinned;      // with a frame
    std::vector<uint8_t> plain(static_cast<size_t>(height) * width, 0);                       // thinned, without it
    std::vector<int32_t> set, lines;
    for (int k = num - 1; k >= 0; --k) {
        for (const int32_t pixel : arriving[k + 1]) {
            set.push_back(framed(pixel, width));
            map[set.back()] = 1;
        }
        if (!arriving[k + 1].empty()) {                                  // else as at the threshold above
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
            matcher.update(lines, plain);
        }
        counts[2 * k] = matcher.size();
        counts[2 * k + 1] = static_cast<int64_t>(lines.size());
    }
    return out;
}

// For each pixel of `prediction` (H, W) the flat index of its partner in `truth`, -1 without one.
py::array_t<int32_t> match(const Map& prediction, const Map& truth, double distance) {
    const int height = prediction.shape(0), width = prediction.shape(1);
    if (truth.shape(0) != height || truth.shape(1) != width)
        throw std::invalid_argument("the maps differ in size");
    py::array_t<int32_t> out({height, width});
    int32_t* partner = out.mutable_data();
    const bool *in = prediction.data(), *wanted = truth.data();
    py::gil_scoped_release release;
    std::vector<uint8_t> map(in, in + static_cast<size_t>(height) * width);
    std::vector<int32_t> set, truth_pixels;
    for (int32_t i = 0; i < height * width; ++i) {
        partner[i] = NONE;
        if (in[i]) set.push_back(i);
        if (wanted[i]) truth_pixels.push_back(i);
    }
    Matcher matcher(wanted, height, width, distance);
    matcher.update(set, map);
    for (size_t t = 0; t < truth_pixels.size(); ++t)
        if (matcher.partner_of_truth()[t] != NONE) partner[matcher.partner_of_truth()[t]] = truth_pixels[t];
    return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("thin", &thin);
    module.def("count_levels", &count_levels);
    module.def("match", &match);
}
