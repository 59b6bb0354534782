// Thinning and matching of boundary maps at many thresholds, the compiled twin of what matching.py does with
// scikit-image and SciPy.
//
// Both steps keep what does not change from one threshold to the next. Thinning visits again only pixels beside a
// removed one. The matching goes from the highest threshold to the lowest: the pairs whose prediction pixel survives
// are kept, and augmenting paths (Pothen and Fan, "Computing the block triangular form of a sparse matrix", ACM TOMS
// 1990) make it maximum again. A search that fails has seen a closed region: all its truth pixels are taken, and from
// their partners no other can be reached. It stays closed, and no search enters it again, until one of its truth pixels
// loses its partner. The graph is never stored: the ground-truth pixels are numbered in row-major order, so
// those within the distance of a pixel are one range of numbers per row of the disc.
//
// H W size of the map, P prediction pixels, T ground-truth pixels, K thresholds.

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

constexpr int32_t NONE = -1;

// Thinning ------------------------------------------------------------------------------------------------------------

using Table = std::array<std::array<bool, 256>, 2>;

// Whether a pixel with this neighbourhood goes, per sub-iteration (Lam, Lee, Suen, PAMI 1992, p. 879). Bit k - 1 of the
// index is the paper's neighbour x_k: east, then counter-clockwise.
Table removal_table() {
    Table table{};
    for (int code = 0; code < 256; ++code) {
        std::array<bool, 10> x{};
        for (int k = 0; k < 10; ++k) x[k] = code >> (k + 7) % 8 & 1;     // x[1] .. x[8], x[9] = x[1]
        int crossings = 0, odd = 0, even = 0;
        for (int k = 1; k < 8; k += 2) {
            crossings += !x[k] && (x[k + 1] || x[k + 2]);
            odd += x[k] || x[k + 1];
            even += x[k + 1] || x[k + 2];
        }
        const int pairs = std::min(odd, even);
        const bool removable = crossings == 1 && pairs >= 2 && pairs <= 3;
        table[0][code] = removable && !((x[2] || x[3] || !x[8]) && x[1]);
        table[1][code] = removable && !((x[6] || x[7] || !x[4]) && x[5]);
    }
    return table;
}

// Thins a map that has a frame of zeros around it. All pixels of a sub-iteration are judged before any is removed.
class Thinner {
  public:
    Thinner(int height, int width)
        : stride_(width + 2), stamp_((height + 2) * static_cast<size_t>(stride_), 0),
          around_{1, 1 - stride_, -stride_, -1 - stride_, -1, stride_ - 1, stride_, stride_ + 1} {}

    // `set`: the positions of the set pixels of `map`.
    void thin(std::vector<uint8_t>& map, const std::vector<int32_t>& set) {
        static const Table table = removal_table();
        std::vector<int32_t> removed[2], candidates;
        for (int step = 0;; ++step) {
            if (step < 2) {
                candidates = set;
            } else {                                   // only what lost a neighbour since this rule was last applied
                candidates.clear();
                ++now_;
                for (const auto& list : removed)
                    for (const int32_t pixel : list)
                        for (const int offset : around_) add(map, pixel + offset, candidates);
            }
            auto& gone = removed[step % 2];
            gone.clear();
            for (const int32_t pixel : candidates) {
                if (!map[pixel]) continue;
                int code = 0;
                for (int k = 0; k < 8; ++k) code |= map[pixel + around_[k]] << k;
                if (table[step % 2][code]) gone.push_back(pixel);
            }
            for (const int32_t pixel : gone) map[pixel] = 0;
            if (step > 0 && removed[0].empty() && removed[1].empty()) return;
        }
    }

  private:
    void add(const std::vector<uint8_t>& map, int32_t pixel, std::vector<int32_t>& candidates) {
        if (!map[pixel] || stamp_[pixel] == now_) return;
        stamp_[pixel] = now_;
        candidates.push_back(pixel);
    }

    int stride_;
    std::vector<uint32_t> stamp_;
    uint32_t now_ = 0;
    std::array<int, 8> around_;
};

// Matching ------------------------------------------------------------------------------------------------------------

class Matcher {
  public:
    Matcher(const bool* truth, int height, int width, double distance)
        : height_(height), width_(width), first_(static_cast<size_t>(height) * width + 1),
          partner_of_pixel_(static_cast<size_t>(height) * width, NONE) {
        int32_t count = 0;
        for (size_t i = 0; i + 1 < first_.size(); ++i) {
            first_[i] = count;
            count += truth[i];
        }
        first_.back() = count;
        partner_of_truth_.assign(count, NONE);
        region_of_truth_.assign(count, NONE);
        seen_.assign(count, 0);
        const double square = distance * distance;
        for (int dy = 0; dy < height && static_cast<double>(dy) * dy <= square; ++dy) {
            int half = 0;
            while (half + 1 < width && static_cast<double>(half + 1) * (half + 1) + static_cast<double>(dy) * dy <= square)
                ++half;
            disc_.push_back({dy, half});                                 // nearest rows first
            if (dy > 0) disc_.push_back({-dy, half});
        }
    }

    // Makes the matching maximum for the prediction pixels `set` (with `map` as their H x W picture).
    void update(const std::vector<int32_t>& set, const std::vector<uint8_t>& map) {
        for (size_t t = 0; t < partner_of_truth_.size(); ++t) {
            int32_t& pixel = partner_of_truth_[t];
            if (pixel == NONE || map[pixel]) continue;
            partner_of_pixel_[pixel] = NONE;
            pixel = NONE;
            --size_;
            if (region_of_truth_[t] != NONE) regions_[find(region_of_truth_[t])].closed = false;
        }
        open_.clear();
        for (const int32_t pixel : set)
            if (partner_of_pixel_[pixel] == NONE) open_.push_back(pixel);
        const auto all = static_cast<int64_t>(partner_of_truth_.size());
        for (bool improved = true; improved && size_ < all;) {           // one phase: disjoint augmenting paths
            phase_ = search_ + 1;
            const size_t before = open_.size();
            open_.erase(std::remove_if(open_.begin(), open_.end(), [this](int32_t p) { return augment(p); }),
                        open_.end());
            improved = open_.size() < before;
        }
    }

    int64_t size() const { return size_; }
    const std::vector<int32_t>& partner_of_truth() const { return partner_of_truth_; }

  private:
    struct Row { int dy, half; };

    // Runs through the ground-truth pixels within the distance of a prediction pixel.
    struct Neighbours {
        int32_t pixel;
        size_t row = 0;
        int32_t next = 0, end = 0;
    };

    struct Region {
        int32_t parent;                                                  // of a union-find forest; itself at the root
        bool closed;
    };

    struct Step {
        Neighbours at;
        int32_t taken;                                                   // the truth pixel this step goes on through
    };

    int32_t advance(Neighbours& n) const {
        while (n.next == n.end) {
            if (n.row == disc_.size()) return NONE;
            const Row row = disc_[n.row++];
            const int y = n.pixel / width_ + row.dy, x = n.pixel % width_;
            if (y < 0 || y >= height_) continue;
            const size_t line = static_cast<size_t>(y) * width_;
            n.next = first_[line + std::max(x - row.half, 0)];
            n.end = first_[line + std::min(x + row.half, width_ - 1) + 1];
        }
        return n.next++;
    }

    // A free truth pixel within the distance of `pixel`, or NONE.
    int32_t free_truth(int32_t pixel) const {
        Neighbours n{pixel};
        for (int32_t t = advance(n); t != NONE; t = advance(n))
            if (partner_of_truth_[t] == NONE) return t;
        return NONE;
    }

    int32_t find(int32_t region) {
        while (regions_[region].parent != region)
            region = regions_[region].parent = regions_[regions_[region].parent].parent;
        return region;
    }

    // The closed region of a truth pixel, or NONE.
    int32_t closed_region(int32_t truth) {
        if (region_of_truth_[truth] == NONE) return NONE;
        const int32_t region = find(region_of_truth_[truth]);
        return regions_[region].closed ? region : NONE;
    }

    // Makes the truth pixels of the failed search a closed region, one with the closed regions that it touched.
    void close() {
        const auto region = static_cast<int32_t>(regions_.size());
        regions_.push_back({region, true});
        for (const int32_t truth : visited_) region_of_truth_[truth] = region;
        for (const int32_t other : touched_) regions_[find(other)].parent = region;
    }

    // Depth-first search for an augmenting path from an unmatched prediction pixel; no truth pixel twice in a phase.
    bool augment(int32_t root) {
        path_.clear();
        visited_.clear();
        touched_.clear();
        ++search_;
        bool complete = true;                                            // nothing skipped that may lead to a free pixel
        path_.push_back({{root}, NONE});
        int32_t end = free_truth(root);
        while (end == NONE && !path_.empty()) {
            Step& step = path_.back();
            const int32_t truth = advance(step.at);
            if (truth == NONE) {
                path_.pop_back();
                continue;
            }
            const int32_t region = closed_region(truth);
            if (region != NONE) {
                if (touched_.empty() || touched_.back() != region) touched_.push_back(region);
            } else if (seen_[truth] >= phase_) {
                complete &= seen_[truth] == search_;
            } else {
                seen_[truth] = search_;
                visited_.push_back(truth);
                step.taken = truth;
                const int32_t pixel = partner_of_truth_[truth];
                path_.push_back({{pixel}, NONE});
                end = free_truth(pixel);
            }
        }
        if (end == NONE) {
            if (complete) close();
            return false;
        }
        seen_[end] = search_;
        path_.back().taken = end;
        for (const Step& step : path_) {
            partner_of_truth_[step.taken] = step.at.pixel;
            partner_of_pixel_[step.at.pixel] = step.taken;
        }
        ++size_;
        return true;
    }

    int height_, width_;
    std::vector<int32_t> first_;               // number of truth pixels before each pixel, (H * W + 1)
    std::vector<int32_t> partner_of_pixel_;    // (H * W) truth number
    std::vector<int32_t> partner_of_truth_;    // (T) pixel
    std::vector<int32_t> region_of_truth_;     // (T) region that was closed around it last
    std::vector<int64_t> seen_;                // (T) search that reached it last
    std::vector<Region> regions_;
    std::vector<int32_t> visited_, touched_;   // by the present search: truth pixels, closed regions
    std::vector<Row> disc_;
    std::vector<int32_t> open_;
    std::vector<Step> path_;
    int64_t search_ = 0, phase_ = 0;           // number of the present search, and of the first one in its phase
    int64_t size_ = 0;
};

// Python --------------------------------------------------------------------------------------------------------------

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
    if (truth.shape(0) != height || truth.shape(1) != width) throw std::invalid_argument("levels and truth differ in size");
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
    std::vector<uint8_t> map((height + 2) * static_cast<size_t>(width + 2), 0), thinned, plain(static_cast<size_t>(height) * width, 0);
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
    if (truth.shape(0) != height || truth.shape(1) != width) throw std::invalid_argument("the maps differ in size");
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
