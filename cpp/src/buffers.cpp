#include "buffers.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "text.hpp"

namespace mscompile {

namespace {

/// IEEE 754 binary16, rounded to nearest even.
std::uint16_t half(double number) {
    if (std::isnan(number)) return 0x7E00;
    const auto sign = static_cast<std::uint16_t>(std::signbit(number) ? 0x8000 : 0);
    const double size = std::fabs(number);
    if (size >= 65520.0) return sign | 0x7C00;
    const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
    const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));  // of the last place
    return static_cast<std::uint16_t>(sign + (steps < 1024 ? steps : ((exponent + 14) * 1024 + steps)));
}

template <class Number>
void store(double number, std::byte* place, const StateSpec& spec) {
    if constexpr (std::is_integral_v<Number>) {
        const double limit = std::ldexp(1.0, std::numeric_limits<Number>::digits);
        const bool fits = number >= static_cast<double>(std::numeric_limits<Number>::min()) && number < limit;
        if (!fits)
            throw Error(Fault::bundle, "state " + in_quotes(spec.name) + " begins with " + shown(number) + ", which " +
                                           spec.dtype + " cannot hold; export the bundle again");
    }
    const auto value = static_cast<Number>(number);
    std::memcpy(place, &value, sizeof value);
}

void store_half(double number, std::byte* place, const StateSpec& /*spec*/) {
    const auto bits = half(number);
    std::memcpy(place, &bits, sizeof bits);
}

using Store = void (*)(double, std::byte*, const StateSpec&);

Store store_of(const std::string& dtype) {
    static const std::map<std::string, Store> kStores = {
        {"bool", store<bool>},          {"int8", store<std::int8_t>},   {"int16", store<std::int16_t>},
        {"int32", store<std::int32_t>}, {"int64", store<std::int64_t>}, {"uint8", store<std::uint8_t>},
        {"float16", store_half},        {"float32", store<float>},      {"float64", store<double>},
    };
    return kStores.at(dtype);
}

std::int64_t product(const Shape& shape, std::size_t first, std::size_t last) {
    std::int64_t result = 1;
    for (auto axis = first; axis < last; ++axis) result *= shape[axis];
    return result;
}

}  // namespace

Buffer::Buffer(const StateSpec& spec, std::int64_t batch, Executor& executor)
    : executor_(&executor),
      spec_(&spec),
      batch_(batch),
      shape_(spec.concrete(batch)),
      value_(executor, byte_size(spec.dtype, shape_)),
      written_(static_cast<std::size_t>(batch), 0) {
    layout_ = layout();
    const auto start = initial();
    start_ = Resident(executor, start.size());
    executor.upload(start_.data(), start.data(), start.size());
    if (is_ring()) capacity_ = shape_[static_cast<std::size_t>(*spec.time_axis)];
    if (!is_ring()) spare_ = Resident(executor, value_.size());
    for (std::int64_t row = 0; row < batch; ++row) {
        reset(row);
        if (!is_ring()) copy_row(start_, spare_, 0, row);
    }
}

Buffer::Layout Buffer::layout() const {
    const auto batch_axis = static_cast<std::size_t>(spec_->batch_axis);
    const auto time_axis = static_cast<std::size_t>(spec_->time_axis.value_or(spec_->batch_axis));
    const auto first = std::min(batch_axis, time_axis);
    const auto second = std::max(batch_axis, time_axis);
    Layout layout;
    layout.outer = product(shape_, 0, first);
    layout.middle = first == second ? 1 : product(shape_, first + 1, second);
    layout.inner = static_cast<std::size_t>(product(shape_, second + 1, shape_.size())) * item_size(spec_->dtype);
    layout.time_first = time_axis < batch_axis;
    return layout;
}

/// The state of one new stream.
Memory Buffer::initial() const {
    const auto shape = spec_->concrete(1);
    const auto item = item_size(spec_->dtype);
    Memory memory(byte_size(spec_->dtype, shape));
    const auto time_axis = static_cast<std::size_t>(spec_->time_axis.value_or(0));
    const std::int64_t rows = spec_->time_axis ? shape[time_axis] : 1;
    const std::int64_t after = product(shape, spec_->time_axis ? time_axis + 1 : 0, shape.size());
    const auto count = static_cast<std::int64_t>(memory.size() / item);
    const auto put = store_of(spec_->dtype);
    for (std::int64_t index = 0; index < count; ++index) {
        const auto place = index / (rows * after) * after + index % after;  // within one row of the time axis
        const auto number = spec_->initial[spec_->initial_is_row ? static_cast<std::size_t>(place) : 0];
        put(number, memory.data() + static_cast<std::size_t>(index) * item, *spec_);
    }
    return memory;
}

/// Copies one stream; `start_` is a batch of one.
void Buffer::copy_row(const Resident& from, Resident& to, std::int64_t source, std::int64_t target) const {
    const auto axis = static_cast<std::size_t>(spec_->batch_axis);
    const auto outer = static_cast<std::size_t>(product(shape_, 0, axis));
    const auto size = static_cast<std::size_t>(product(shape_, axis + 1, shape_.size())) * item_size(spec_->dtype);
    const auto from_pitch = (from.size() == start_.size() ? 1 : static_cast<std::size_t>(batch_)) * size;
    executor_->copy(to.data() + static_cast<std::size_t>(target) * size, static_cast<std::size_t>(batch_) * size,
                    from.data() + static_cast<std::size_t>(source) * size, from_pitch, size, outer);
}

Resident Buffer::leading(const Shape& shape) const {
    const auto axis = static_cast<std::size_t>(*spec_->time_axis);
    const auto inner = static_cast<std::size_t>(product(shape_, axis + 1, shape_.size())) * item_size(spec_->dtype);
    const auto taken = static_cast<std::size_t>(shape[axis]) * inner;
    const auto whole = static_cast<std::size_t>(shape_[axis]) * inner;
    Resident copy(*executor_, byte_size(spec_->dtype, shape));
    executor_->copy(copy.data(), taken, value_.data(), whole, taken,
                    static_cast<std::size_t>(product(shape_, 0, axis)));
    return copy;
}

std::vector<std::byte> Buffer::bytes() const {
    std::vector<std::byte> copy(value_.size());
    executor_->download(copy.data(), value_.data(), copy.size());
    return copy;
}

void Buffer::swap(const Rows& rows) {
    for (std::size_t row = 0; row < rows.size(); ++row)
        if (!rows[row]) copy_row(value_, spare_, static_cast<std::int64_t>(row), static_cast<std::int64_t>(row));
    std::swap(value_, spare_);
}

void Buffer::append(const std::byte* output, std::int64_t added, const Rows& rows) {
    for (std::int64_t row = 0; row < batch_; ++row)
        if (rows.empty() || rows[static_cast<std::size_t>(row)]) append_row(output, added, row);
}

/// Of more rows than there are slots, the newest.
void Buffer::append_row(const std::byte* output, std::int64_t added, std::int64_t row) {
    auto& written = written_[static_cast<std::size_t>(row)];
    const auto count = std::min(added, capacity_);
    const auto skipped = added - count;
    const auto start = (written + skipped) % capacity_;
    const auto head = std::min(count, capacity_ - start);
    write(output, added, skipped, start, head, row);
    if (head < count) write(output, added, skipped + head, 0, count - head, row);
    written += added;
}

/// Copies `count` rows of an output of `length`, beginning with row `from`, to the slots from `slot` on.
void Buffer::write(const std::byte* output, std::int64_t length, std::int64_t from, std::int64_t slot,
                   std::int64_t count, std::int64_t row) {
    const auto middle = layout_.middle;
    const auto place = [&](std::int64_t outer, std::int64_t time, std::int64_t rows) {
        const auto index = layout_.time_first ? (outer * rows + time) * middle * batch_ + row
                                              : (outer * batch_ + row) * middle * rows + time;
        return static_cast<std::size_t>(index) * layout_.inner;
    };
    const auto many = [&](std::int64_t items) { return static_cast<std::size_t>(items) * layout_.inner; };
    for (std::int64_t i = 0; i < layout_.outer; ++i) {
        auto* to = value_.data() + place(i, slot, capacity_);
        const auto* new_rows = output + place(i, from, length);
        if (layout_.time_first)
            executor_->copy(to, many(batch_), new_rows, many(batch_), layout_.inner,
                            static_cast<std::size_t>(count * middle));
        else
            executor_->copy(to, many(capacity_), new_rows, many(length), many(count), static_cast<std::size_t>(middle));
    }
}

SavedState Buffer::saved() const {
    SavedState saved;
    saved.shape = shape_;
    saved.bytes = bytes();
    if (is_ring()) saved.written = written_;
    return saved;
}

void Buffer::restore(const SavedState& saved) {
    executor_->upload(value_.data(), saved.bytes.data(), value_.size());
    if (is_ring()) written_ = saved.written;
}

void Buffer::reset(std::int64_t row) {
    copy_row(start_, value_, 0, row);
    written_[static_cast<std::size_t>(row)] = 0;
}

}  // namespace mscompile
