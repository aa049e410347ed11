// Greedy and sampled generation.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "mscompile/session.hpp"

namespace mscompile {

struct Sampling {
    double temperature = 0.0;           ///< 0 is greedy
    std::optional<std::uint64_t> seed;  ///< none: another text each time
};

/// Token ids that continue `prompt` on a session of one stream. A seed gives the tokens that it gives in Python,
/// wherever the logits agree. `each` gets every token as it comes, and ends the text by returning false.
std::vector<std::int64_t> generate(Session& session, const std::vector<std::int64_t>& prompt, std::int64_t count,
                                   const Sampling& sampling = {},
                                   const std::function<bool(std::int64_t)>& each = nullptr);

/// Uniform numbers in [0, 1), the ones of numpy's `default_rng(seed).random()`: PCG64 (O'Neill 2014, XSL RR 128/64)
/// seeded by way of the SeedSequence of NEP 19.
class Random {
  public:
    explicit Random(std::optional<std::uint64_t> seed);
    double uniform();

  private:
    __extension__ using Word = unsigned __int128;
    Word state_ = 0;
    Word increment_ = 0;
};

}  // namespace mscompile
