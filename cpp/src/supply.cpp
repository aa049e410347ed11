#include "supply.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "text.hpp"

namespace mscompile {

namespace {

template <class Number>
Number number_at(const std::byte* data, std::size_t index) {
    Number number = 0;
    std::memcpy(&number, data + index * sizeof number, sizeof number);
    return number;
}

/// Whether the number at `index` is finite; integers are.
bool is_finite(const std::string& dtype, const std::byte* data, std::size_t index) {
    if (dtype == "float16") return (number_at<std::uint16_t>(data, index) & 0x7C00U) != 0x7C00U;
    if (dtype == "float32") return std::isfinite(number_at<float>(data, index));
    return dtype != "float64" || std::isfinite(number_at<double>(data, index));
}

std::int64_t whole_at(const std::string& dtype, const std::byte* data, std::size_t index) {
    if (dtype == "int8") return number_at<std::int8_t>(data, index);
    if (dtype == "uint8") return number_at<std::uint8_t>(data, index);
    if (dtype == "int16") return number_at<std::int16_t>(data, index);
    if (dtype == "int32") return number_at<std::int32_t>(data, index);
    return number_at<std::int64_t>(data, index);
}

/// The function that a source has to be, in Python's terms.
std::string function(const HostInput& given) {
    std::vector<std::string> sizes = {"N"};
    for (const auto size : given.shape) sizes.push_back(std::to_string(size));
    const auto numbers = given.below ? " of 0 to " + std::to_string(*given.below - 1) : "";
    return "a function from int64 tokens (N, " + std::to_string(given.every) + ") to " + given.dtype + " (" +
           join(sizes) + ")" + numbers;
}

}  // namespace

void Supply::ask(const std::int64_t* recent, const std::vector<std::int64_t>& position, const std::int64_t* tokens,
                 std::int64_t count) {
    const auto every = given_->every;
    std::vector<std::int64_t> chunks;
    first_.clear();
    offset_ = {0};
    for (std::size_t row = 0; row < position.size(); ++row) {
        const auto held = position[row] % every;  // of a chunk that an earlier step began
        const auto* ring = recent + static_cast<std::int64_t>(row) * every;
        std::vector<std::int64_t> line(ring, ring + held);
        const auto* fed = tokens + static_cast<std::int64_t>(row) * count;
        line.insert(line.end(), fed, fed + count);
        const auto whole = static_cast<std::int64_t>(line.size()) / every;
        chunks.insert(chunks.end(), line.begin(), line.begin() + whole * every);
        first_.push_back(position[row] / every);
        offset_.push_back(offset_.back() + whole);
    }
    const auto wanted = offset_.back();
    entries_ = Memory(static_cast<std::size_t>(wanted) * entry_size());
    if (wanted == 0) return;
    source_(chunks.data(), wanted, entries_.data());
    check(wanted);
}

void Supply::check(std::int64_t count) const {
    const auto numbers = static_cast<std::size_t>(count) * entry_size() / item_size(given_->dtype);
    for (std::size_t index = 0; index < numbers; ++index) {
        if (!is_finite(given_->dtype, entries_.data(), index))
            throw Error(Fault::input, "the source of " + given_->name + " returned a number that is not finite");
        if (!given_->below) continue;
        const auto number = whole_at(given_->dtype, entries_.data(), index);
        if (number < 0 || number >= *given_->below)
            throw Error(Fault::input, "the source of " + given_->name + " returned " + std::to_string(number) +
                                          "; it must be " + function(*given_));
    }
}

void Supply::fill(std::byte* entries, std::int64_t slots, const std::vector<std::int64_t>& position,
                  std::int64_t tokens) const {
    const auto size = entry_size();
    std::memset(entries, 0, position.size() * static_cast<std::size_t>(slots) * size);
    for (std::size_t row = 0; row < position.size(); ++row) {
        const auto start = position[row] / given_->every - first_[row];
        const auto end = (position[row] + tokens) / given_->every - first_[row];
        const auto known = offset_[row + 1] - offset_[row];
        const auto count = std::min({end, known, start + slots}) - start;
        if (count > 0)
            std::memcpy(entries + row * static_cast<std::size_t>(slots) * size,
                        entries_.data() + static_cast<std::size_t>(offset_[row] + start) * size,
                        static_cast<std::size_t>(count) * size);
    }
}

std::vector<Supply> supplies(const std::vector<HostInput>& inputs, const Sources& sources) {
    std::vector<std::string> names;
    std::vector<std::string> strangers;
    for (const auto& given : inputs) names.push_back(given.name);
    for (const auto& [name, source] : sources)
        if (std::find(names.begin(), names.end(), name) == names.end()) strangers.push_back(name);
    if (!strangers.empty())
        throw Error(Fault::input, "this model takes no " + join(strangers) + " from its host; it takes " +
                                      (names.empty() ? "nothing" : join(names)));
    std::vector<Supply> found;
    for (const auto& given : inputs) {
        const auto source = sources.find(given.name);
        if (source == sources.end() || !source->second)
            throw Error(Fault::input, "this model needs sources={" + in_quotes(given.name) + ": f} from its host, f " +
                                          function(given));
        found.emplace_back(given, source->second);
    }
    return found;
}

}  // namespace mscompile
