#include "mscompile/spec.hpp"

#include <algorithm>
#include <charconv>
#include <limits>
#include <tuple>

namespace mscompile {

namespace {

constexpr std::int64_t kUnlimited = std::int64_t{1} << 62U;

/// What a word stands for; the divisor of "chunk/k" was checked when the manifest was read.
std::int64_t size_of(const std::string& word, const Sizes& sizes) {
    const auto slash = std::min(word.find('/'), word.size());
    std::int64_t divisor = 1;
    if (slash < word.size()) std::from_chars(word.data() + slash + 1, word.data() + word.size(), divisor);
    const auto name = word.substr(0, slash);
    const auto size = name == "batch" ? sizes.batch : name == "chunk" ? sizes.chunk : sizes.context;
    return size / divisor;
}

}  // namespace

Shape TensorSpec::concrete(const Sizes& sizes) const {
    Shape result;
    for (const auto& dim : shape) {
        const auto* word = std::get_if<std::string>(&dim);
        result.push_back(word != nullptr ? size_of(*word, sizes) : std::get<std::int64_t>(dim));
    }
    return result;
}

bool operator==(const TensorSpec& a, const TensorSpec& b) {
    return std::tie(a.name, a.dtype, a.shape) == std::tie(b.name, b.dtype, b.shape);
}

bool operator==(const ScheduledCall& a, const ScheduledCall& b) { return a.tokens == b.tokens && a.graphs == b.graphs; }

Shape StateSpec::concrete(std::int64_t batch) const { return TensorSpec{name, dtype, shape}.concrete({batch, 0, 0}); }

StateSpec HostInput::recent() const {
    StateSpec state;
    state.name = name + ".recent";
    state.dtype = "int64";
    state.shape = {"batch", every};
    state.update = Update::append;
    state.time_axis = 1;
    return state;
}

TensorSpec HostInput::as_input(const Dim& tokens) const {
    const bool many = tokens == Dim("chunk") && every > 1;
    TensorSpec tensor{name, dtype, {"batch", many ? Dim("chunk/" + std::to_string(every)) : tokens}};
    tensor.shape.insert(tensor.shape.end(), shape.begin(), shape.end());
    return tensor;
}

std::int64_t Schedule::period() const {
    std::int64_t sum = 0;
    for (const auto& tick : ticks) sum += tick.repeat;
    return sum;
}

const Tick& Schedule::tick(std::int64_t position) const {
    auto phase = position % period();
    auto tick = ticks.begin();
    for (; phase >= tick->repeat; ++tick) phase -= tick->repeat;
    return *tick;
}

ScheduledCall Schedule::next_call(std::int64_t position, std::int64_t remaining) const {
    const auto length = chunk(position, remaining);
    const bool many = prefill.has_value() && length > 1;
    const auto& last = tick(many ? position + length - 1 : position);
    ScheduledCall call;
    call.tokens = many ? length : 1;
    if (many) call.graphs = {*prefill};
    if (!many) call.graphs = last.graphs;
    call.graphs.insert(call.graphs.end(), last.closing.begin(), last.closing.end());
    return call;
}

std::int64_t Schedule::chunk(std::int64_t position, std::int64_t remaining) const {
    if (!prefill || position % chunk_multiple != 0) return 0;
    const auto length = std::min({remaining, max_chunk, until_closing(position)});
    return length - length % chunk_multiple;
}

/// Tokens up to and including the next one with closing graphs; without end where none has.
std::int64_t Schedule::until_closing(std::int64_t position) const {
    const auto phase = position % period();
    std::int64_t start = 0;
    std::int64_t nearest = kUnlimited;
    for (const auto& tick : ticks) {
        if (!tick.closing.empty()) {
            const auto first = start + tick.repeat > phase ? std::max(start, phase) : start + period();
            nearest = std::min(nearest, first - phase + 1);
        }
        start += tick.repeat;
    }
    return nearest;
}

}  // namespace mscompile
