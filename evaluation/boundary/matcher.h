// Maximum matching of prediction and ground-truth pixels within a distance, kept up to date as the prediction changes.
//
// Pairs whose prediction pixel survives are kept, and augmenting paths (Pothen and Fan, "Computing the block triangular
// form of a sparse matrix", ACM TOMS 1990) make the matching maximum again. A search that fails has seen a closed
// region: all its truth pixels are taken, and from their partners no other can be reached. It stays closed, and no
// search enters it again, until one of its truth pixels loses its partner. The graph is never stored: the ground-truth
// pixels are numbered in row-major order, so those near a pixel are one range of numbers per row of the disc.
//
// H W size of the map, T ground-truth pixels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

constexpr int32_t NONE = -1;

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
            while (half + 1 < width && (half + 1.0) * (half + 1.0) + static_cast<double>(dy) * dy <= square) ++half;
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

    // The flat index of a prediction pixel's partner, or NONE.
    int32_t partner(int32_t pixel) const {
        const int32_t truth = partner_of_pixel_[pixel];
        if (truth == NONE) return NONE;
        return std::upper_bound(first_.begin(), first_.end(), truth) - first_.begin() - 1;
    }

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
        bool complete = true;                                            // nothing skipped but closed regions
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
