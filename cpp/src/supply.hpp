// Host inputs: what a source says of the chunks that a step completes, and which of it each call takes.
#pragma once

#include <cstdint>
#include <vector>

#include "memory.hpp"
#include "mscompile/session.hpp"
#include "mscompile/spec.hpp"

namespace mscompile {

/// One host input of one session.
class Supply {
  public:
    Supply(const HostInput& given, Source source) : given_(&given), source_(std::move(source)) {}

    [[nodiscard]] const HostInput& given() const { return *given_; }

    /// Gets what is needed to consume `tokens` (batch, count); `recent` (batch, every) is the ring of those before.
    /// Throws Error (input) where the source answers wrongly.
    void ask(const std::int64_t* recent, const std::vector<std::int64_t>& position, const std::int64_t* tokens,
             std::int64_t count);

    /// Writes what a call of so many tokens takes, (batch, slots, *shape). Rows that complete no chunk get zeros.
    void fill(std::byte* entries, std::int64_t slots, const std::vector<std::int64_t>& position,
              std::int64_t tokens) const;

  private:
    [[nodiscard]] std::size_t entry_size() const { return byte_size(given_->dtype, given_->shape); }
    void check(std::int64_t count) const;

    const HostInput* given_;
    Source source_;
    Memory entries_;                    // (chunks of all rows, *shape)
    std::vector<std::int64_t> first_;   // of each row, the number of the chunk that its entries begin with
    std::vector<std::int64_t> offset_;  // of each row, the place of its first entry; one more at the end
};

/// One for each host input. Throws Error (input) for a source that is missing, or that nothing takes.
std::vector<Supply> supplies(const std::vector<HostInput>& inputs, const Sources& sources);

}  // namespace mscompile
