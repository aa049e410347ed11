// What a session keeps of each state, and how a step's results get there.
//
// - A replaced state has two buffers; a graph reads one and writes the other, then they swap.
// - An appended state has one buffer, a ring; the graph returns new rows, which are copied in.
//
// The buffers lie where the session's executor keeps them; only its functions touch them.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.hpp"
#include "mscompile/session.hpp"
#include "mscompile/spec.hpp"

namespace mscompile {

/// Which rows of the batch a call is for; empty: all of them.
using Rows = std::vector<bool>;

class Buffer {
  public:
    Buffer(const StateSpec& spec, std::int64_t batch, Executor& executor);

    [[nodiscard]] const StateSpec& spec() const { return *spec_; }
    [[nodiscard]] const Shape& shape() const { return shape_; }
    [[nodiscard]] const std::byte* value() const { return value_.data(); }
    [[nodiscard]] bool is_ring() const { return spec_->update == Update::append; }

    /// Where a graph writes a replaced state.
    [[nodiscard]] std::byte* spare() { return spare_.data(); }

    /// A copy of the leading `shape` of the value, of which only the time axis may be shorter.
    [[nodiscard]] Resident leading(const Shape& shape) const;

    /// A copy of the value in the host's memory.
    [[nodiscard]] std::vector<std::byte> bytes() const;

    /// After a graph wrote `spare()`: it becomes the value, for these rows.
    void swap(const Rows& rows);

    /// After a graph wrote `added` new rows: they go behind the last ones of these streams, wrapping around.
    void append(const std::byte* output, std::int64_t added, const Rows& rows);

    [[nodiscard]] SavedState saved() const;
    void restore(const SavedState& saved);
    void reset(std::int64_t row);

  private:
    /// The axes as (outer, first, middle, second, inner), first and second being batch and time in their order.
    struct Layout {
        std::int64_t outer = 1;
        std::int64_t middle = 1;
        std::size_t inner = 1;  // bytes
        bool time_first = false;
    };

    [[nodiscard]] Layout layout() const;
    void copy_row(const Resident& from, Resident& to, std::int64_t source, std::int64_t target) const;
    void append_row(const std::byte* output, std::int64_t added, std::int64_t row);
    void write(const std::byte* output, std::int64_t length, std::int64_t from, std::int64_t slot, std::int64_t count,
               std::int64_t row);
    [[nodiscard]] Memory initial() const;

    Executor* executor_;
    const StateSpec* spec_;
    std::int64_t batch_;
    Shape shape_;
    Layout layout_;
    Resident value_;
    Resident spare_;
    Resident start_;  // of one row
    std::int64_t capacity_ = 0;
    std::vector<std::int64_t> written_;
};

}  // namespace mscompile
