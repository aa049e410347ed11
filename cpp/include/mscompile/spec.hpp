// The values that describe a streaming model: states, graphs, a schedule, and inputs that only the host can supply.
// Their meaning is that of the bundle format, schema 1.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace mscompile {

using Shape = std::vector<std::int64_t>;

/// One dimension: a size, or a word of the bundle format ("batch", "chunk", "chunk/k", "context", "context/k").
using Dim = std::variant<std::int64_t, std::string>;

/// What the words in shapes stand for during one call.
struct Sizes {
    std::int64_t batch = 1;    ///< rows of the session
    std::int64_t chunk = 1;    ///< tokens of this call
    std::int64_t context = 0;  ///< tokens that the longest row has consumed before it
};

/// A graph input or output; `dtype` is a numpy name.
struct TensorSpec {
    std::string name;
    std::string dtype;
    std::vector<Dim> shape;

    [[nodiscard]] Shape concrete(const Sizes& sizes) const;
};

bool operator==(const TensorSpec& a, const TensorSpec& b);

enum class Update { replace, append };

/// One remembered tensor; graphs read it as `<name>.in` and write it as `<name>.out`.
struct StateSpec {
    std::string name;
    std::string dtype;
    std::vector<Dim> shape;  ///< fixed sizes, and "batch" once
    Update update = Update::replace;
    std::optional<std::int64_t> time_axis;
    std::int64_t batch_axis = 0;
    std::vector<double> initial = {0.0};  ///< one number, or one row: all axes but batch and time, row-major
    bool initial_is_row = false;
    bool reads_initial = false;  ///< append: do logits depend on slots that hold `initial` and were not written yet?

    [[nodiscard]] std::string input_name() const { return name + ".in"; }
    [[nodiscard]] std::string output_name() const { return name + ".out"; }
    [[nodiscard]] Shape concrete(std::int64_t batch) const;
};

/// What graphs take once every `every` tokens and the host gets from a source.
struct HostInput {
    std::string name;
    std::string dtype;
    Shape shape;  ///< of one entry
    std::int64_t every = 1;
    std::optional<std::int64_t> below;  ///< whole numbers are 0 to below - 1

    [[nodiscard]] StateSpec recent() const;
    [[nodiscard]] TensorSpec as_input(const Dim& tokens) const;
};

/// One static graph. `tokens` is what a call consumes: 0 (it only updates states), 1 or "chunk".
struct GraphSpec {
    std::string name;
    std::vector<TensorSpec> inputs;
    std::vector<TensorSpec> outputs;
    std::vector<std::string> reads;
    std::vector<std::string> writes;
    Dim tokens;
};

/// What runs for one token, for `repeat` phases in a row; `closing` graphs run after it.
struct Tick {
    std::vector<std::string> graphs;
    std::vector<std::string> closing;
    std::int64_t repeat = 1;
};

/// The next thing a host does: these graphs, in order, on this many tokens.
struct ScheduledCall {
    std::vector<std::string> graphs;
    std::int64_t tokens = 1;
};

bool operator==(const ScheduledCall& a, const ScheduledCall& b);

/// Which graphs run for token number n: the tick at phase `n % period()`.
struct Schedule {
    std::vector<Tick> ticks;
    std::optional<std::string> prefill;
    std::int64_t chunk_multiple = 1;
    std::int64_t max_chunk = 1;

    [[nodiscard]] std::int64_t period() const;
    [[nodiscard]] const Tick& tick(std::int64_t position) const;
    /// What to run next for a row that has consumed `position` tokens and has `remaining` to go.
    [[nodiscard]] ScheduledCall next_call(std::int64_t position, std::int64_t remaining) const;

  private:
    [[nodiscard]] std::int64_t chunk(std::int64_t position, std::int64_t remaining) const;
    [[nodiscard]] std::int64_t until_closing(std::int64_t position) const;
};

/// Everything a host needs to run a model.
struct StreamSpec {
    std::vector<StateSpec> states;
    std::vector<GraphSpec> graphs;
    Schedule schedule;
    std::int64_t vocab_size = 0;
    std::int64_t max_batch = 0;
    std::optional<std::int64_t> max_context;  ///< tokens after which a row must be reset; none: endless
    std::vector<HostInput> inputs;
};

}  // namespace mscompile
