#include "mscompile/generate.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <random>

#include "text.hpp"

namespace mscompile {

namespace {

__extension__ using Wide = unsigned __int128;

constexpr Wide wide(std::uint64_t high, std::uint64_t low) { return (Wide{high} << 64U) | low; }

constexpr Wide kMultiplier = wide(2549297995355413924U, 4865540595714422341U);

/// The entropy mixer of NEP 19's SeedSequence (O'Neill's seed_seq_fe) with a pool of four words.
class SeedSequence {
  public:
    explicit SeedSequence(std::uint64_t seed) {
        const std::array<std::uint32_t, 4> entropy = {static_cast<std::uint32_t>(seed),
                                                      static_cast<std::uint32_t>(seed >> 32U), 0, 0};
        for (std::size_t i = 0; i < pool_.size(); ++i) pool_[i] = hashed(entropy[i]);
        for (std::size_t from = 0; from < pool_.size(); ++from)
            for (std::size_t to = 0; to < pool_.size(); ++to)
                if (from != to) pool_[to] = mixed(pool_[to], hashed(pool_[from]));
    }

    /// Eight words of output as four of 64 bits.
    [[nodiscard]] std::array<std::uint64_t, 4> words() const {
        std::array<std::uint64_t, 4> found{};
        std::uint32_t constant = 0x8B51F9DD;
        for (std::size_t i = 0; i < 8; ++i) {
            std::uint32_t value = pool_[i % pool_.size()] ^ constant;
            constant *= 0x58F38DEDU;
            value *= constant;
            value ^= value >> 16U;
            found[i / 2] |= static_cast<std::uint64_t>(value) << (i % 2 == 0 ? 0U : 32U);
        }
        return found;
    }

  private:
    std::uint32_t hashed(std::uint32_t value) {
        value ^= constant_;
        constant_ *= 0x931E8875U;
        value *= constant_;
        return value ^ (value >> 16U);
    }

    static std::uint32_t mixed(std::uint32_t a, std::uint32_t b) {
        const std::uint32_t value = a * 0xCA01F9DDU - b * 0x4973F715U;
        return value ^ (value >> 16U);
    }

    std::array<std::uint32_t, 4> pool_{};
    std::uint32_t constant_ = 0x43B0D7E5;
};

std::uint64_t entropy() {
    std::random_device device;
    return (std::uint64_t{device()} << 32U) | device();
}

/// Draws from softmax(logits / temperature) by inverting its distribution function.
std::int64_t sample(const float* logits, std::int64_t vocab, double temperature, double uniform) {
    std::vector<double> cumulative(logits, logits + vocab);
    for (auto& value : cumulative) value /= temperature;
    const double highest = *std::max_element(cumulative.begin(), cumulative.end());
    double sum = 0.0;
    for (auto& value : cumulative) value = sum += std::exp(value - highest);
    const auto found = std::upper_bound(cumulative.begin(), cumulative.end(), uniform * sum);
    return std::min<std::int64_t>(found - cumulative.begin(), vocab - 1);
}

}  // namespace

Random::Random(std::optional<std::uint64_t> seed) {
    const auto words = SeedSequence(seed ? *seed : entropy()).words();
    increment_ = (wide(words[2], words[3]) << 1U) | 1U;
    state_ = (increment_ + wide(words[0], words[1])) * kMultiplier + increment_;
}

double Random::uniform() {
    state_ = state_ * kMultiplier + increment_;
    const auto folded = static_cast<std::uint64_t>(state_ >> 64U) ^ static_cast<std::uint64_t>(state_);
    const auto turn = static_cast<unsigned>(state_ >> 122U);
    const auto word = (folded >> turn) | (folded << ((64U - turn) % 64U));
    return static_cast<double>(word >> 11U) * 0x1p-53;
}

std::vector<std::int64_t> generate(Session& session, const std::vector<std::int64_t>& prompt, std::int64_t count,
                                   const Sampling& sampling, const std::function<bool(std::int64_t)>& each) {
    const auto [temperature, seed] = sampling;
    if (!(temperature >= 0) || !std::isfinite(temperature))
        throw Error(Fault::input, "temperature must be 0 (greedy) or more, not " + shown(temperature));
    if (session.batch() != 1)
        throw Error(Fault::input,
                    "a text is generated on a session of one stream, not of " + std::to_string(session.batch()));
    Random random(seed);
    std::vector<std::int64_t> text;
    auto logits = session.step(prompt);
    while (static_cast<std::int64_t>(text.size()) < count) {
        const auto* last = logits.at(0, logits.tokens - 1);
        text.push_back(temperature == 0 ? std::max_element(last, last + logits.vocab) - last
                                        : sample(last, logits.vocab, temperature, random.uniform()));
        if (each && !each(text.back())) break;
        if (static_cast<std::int64_t>(text.size()) < count) logits = session.step(&text.back(), 1);
    }
    return text;
}

}  // namespace mscompile
