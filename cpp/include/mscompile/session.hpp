// The host of a stream program: owns the states and walks the schedule.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "mscompile/backend.hpp"
#include "mscompile/error.hpp"
#include "mscompile/spec.hpp"

namespace mscompile {

/// Logits (batch, tokens, vocab), float32, row-major: a view that the next call on the session ends.
struct Logits {
    const float* data = nullptr;
    std::int64_t batch = 0;
    std::int64_t tokens = 0;
    std::int64_t vocab = 0;

    /// The `vocab` logits after one token of one row.
    [[nodiscard]] const float* at(std::int64_t row, std::int64_t token) const {
        return data + (row * tokens + token) * vocab;
    }
};

/// The value of one state at the time of a snapshot.
struct SavedState {
    Shape shape;
    std::vector<std::byte> bytes;
    std::vector<std::int64_t> written;  ///< of an appended state: the rows each stream has appended since its reset
};

/// All that a session knows: a copy, independent of the session.
struct Snapshot {
    std::vector<std::int64_t> position;
    std::map<std::string, SavedState> states;
};

/// Supplies one host input: reads `count` completed chunks, (count, every) token ids, and writes the entries
/// (count, *shape) of the input's dtype. An exception passes through `step`, which then has consumed nothing.
using Source = std::function<void(const std::int64_t* chunks, std::int64_t count, void* entries)>;
using Sources = std::map<std::string, Source>;

/// A group of streams, one a batch row. One thread at a time: a second one gets an Error.
class Session {
  public:
    /// Streams at position 0. Throws Error for a batch outside `spec.max_batch`, and for missing or unknown sources.
    Session(std::shared_ptr<const StreamSpec> spec, std::shared_ptr<const Backend> backend, std::int64_t batch = 1,
            const Sources& sources = {});
    Session(Session&&) noexcept;
    Session& operator=(Session&&) noexcept;
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session();

    [[nodiscard]] std::int64_t batch() const;
    [[nodiscard]] std::int64_t vocab_size() const;

    /// Tokens consumed by each row since its reset, (batch,).
    [[nodiscard]] std::vector<std::int64_t> position() const;

    /// Consumes tokens (batch, count), row-major, any count >= 1. The logits lie in the engine's own output where one
    /// call takes all tokens, so that nothing is copied; they are valid until the next call on this session.
    /// Throws Error (input) for tokens that do not fit, with nothing consumed, and Error (engine) if the engine
    /// fails: then `reset()` or `restore()` before the next step.
    Logits step(const std::int64_t* tokens, std::int64_t count);

    /// The same for `tokens.size() / batch()` tokens a row.
    Logits step(const std::vector<std::int64_t>& tokens);

    [[nodiscard]] Snapshot snapshot() const;

    /// Back to a snapshot of a session with the same spec and batch.
    void restore(const Snapshot& snapshot);

    /// Begins new streams in all rows, or in these.
    void reset();
    void reset(const std::vector<std::int64_t>& rows);

  private:
    class Host;
    std::unique_ptr<Host> host_;
};

}  // namespace mscompile
