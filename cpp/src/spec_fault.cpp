#include "spec_fault.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <set>

#include "text.hpp"

namespace mscompile {

namespace {

using Names = std::vector<std::string>;
using States = std::map<std::string, const StateSpec*>;

constexpr std::array<const char*, 9> kDtypes = {"bool",  "int8",    "int16",   "int32",  "int64",
                                                "uint8", "float16", "float32", "float64"};
constexpr std::int64_t kSizeLimit = (std::int64_t{1} << 31U) - 1;  // of one dimension, and of every count
constexpr std::int64_t kValuesLimit = std::int64_t{1} << 40U;      // of one stream in a state
constexpr std::int64_t kVocabLimit = std::int64_t{1} << 24U;
constexpr std::size_t kRankLimit = 32;
constexpr std::size_t kDigitsLimit = 9;  // of the k in "chunk/k"

/// Thrown at the first fault, caught in `spec_fault`.
struct Found {
    std::string sentence;
};

void require(bool holds, const std::string& sentence) {
    if (!holds) throw Found{sentence};
}

bool contains(const Names& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

void require_distinct(const Names& names, const std::string& before, const std::string& after) {
    std::set<std::string> seen;
    for (const auto& name : names) require(seen.insert(name).second, before + in_quotes(name) + after);
}

template <class Items>
Names names_of(const Items& items) {
    Names names;
    for (const auto& item : items) names.push_back(item.name);
    return names;
}

bool is_divided(const std::string& word) {
    const auto slash = word.find('/');
    const auto name = word.substr(0, slash);
    if (name != "chunk" && name != "context") return false;
    if (slash == std::string::npos) return true;
    const auto digits = word.substr(slash + 1);
    return !digits.empty() && digits.size() <= kDigitsLimit && digits.front() != '0' &&
           digits.find_first_not_of("0123456789") == std::string::npos;
}

bool is_dimension(const Dim& dim) {
    if (const auto* word = std::get_if<std::string>(&dim)) return *word == "batch" || is_divided(*word);
    const auto size = std::get<std::int64_t>(dim);
    return 0 <= size && size <= kSizeLimit;
}

/// The product of the sizes in a shape; of more than 64 bits, the largest number there is.
std::int64_t product(const std::vector<Dim>& shape) {
    std::int64_t result = 1;
    for (const auto& dim : shape) {
        const auto* size = std::get_if<std::int64_t>(&dim);
        if (size == nullptr || !__builtin_mul_overflow(result, *size, &result)) continue;
        return std::numeric_limits<std::int64_t>::max();
    }
    return result;
}

void check_tensor(const std::string& where, const std::string& dtype, const std::vector<Dim>& shape) {
    const bool known = std::find(kDtypes.begin(), kDtypes.end(), dtype) != kDtypes.end();
    require(known, where + " has dtype " + in_quotes(dtype) + ", not one of " + join({kDtypes.begin(), kDtypes.end()}));
    require(shape.size() <= kRankLimit,
            where + " has " + std::to_string(shape.size()) + " dimensions, more than " + std::to_string(kRankLimit));
    for (const auto& dim : shape)
        require(is_dimension(dim), where + " has dimension " + shown(dim) +
                                       ", not a size, 'batch', 'chunk', 'context' or one of these by k");
}

/// Elements of one row: of all axes but batch and time.
std::int64_t row_size(const StateSpec& state) {
    auto row = state.shape;
    if (state.time_axis) row[static_cast<std::size_t>(*state.time_axis)] = 1;
    return product(row);
}

void check_state(const StateSpec& state) {
    const auto where = "state " + in_quotes(state.name);
    const auto rank = static_cast<std::int64_t>(state.shape.size());
    check_tensor(where, state.dtype, state.shape);
    const auto values = product(state.shape);
    require(values <= kValuesLimit,
            where + " has " + std::to_string(values) + " values a stream, more than " + std::to_string(kValuesLimit));
    const auto words = std::count_if(state.shape.begin(), state.shape.end(),
                                     [](const Dim& dim) { return std::holds_alternative<std::string>(dim); });
    const bool there = 0 <= state.batch_axis && state.batch_axis < rank &&
                       state.shape[static_cast<std::size_t>(state.batch_axis)] == Dim("batch");
    require(there, where + " has batch_axis " + std::to_string(state.batch_axis) + ", where its shape " +
                       shown(state.shape) + " has no 'batch'");
    require(words == 1, where + " has shape " + shown(state.shape) + ", which must be fixed but for 'batch'");
    require(state.update != Update::append || state.time_axis, where + " is 'append' with time_axis None");
    if (state.time_axis) {
        const bool fits = 0 <= *state.time_axis && *state.time_axis < rank && *state.time_axis != state.batch_axis;
        require(fits, where + " has time_axis " + std::to_string(*state.time_axis) + ", which its shape " +
                          shown(state.shape) + " lacks");
    }
    const auto row = row_size(state);
    const auto given = static_cast<std::int64_t>(state.initial.size());
    require(!state.initial_is_row || given == row,
            where + " has " + std::to_string(given) + " initial values, where a row has " + std::to_string(row));
    const auto rows = state.update == Update::append
                          ? std::get<std::int64_t>(state.shape[static_cast<std::size_t>(*state.time_axis)])
                          : 1;
    require(rows > 0, where + " is 'append' and has no rows");
}

void check_named(const std::string& where, const std::string& what, const Names& names, const Names& wanted) {
    require_distinct(names, where + " has " + what + " ", " twice");
    const std::set<std::string> there(names.begin(), names.end());
    for (const auto& name : wanted)
        if (there.count(name) == 0) throw Found{where + " lacks " + what + " " + in_quotes(name)};
}

void check_states_of(const std::string& where, const std::string& verb, const Names& names, const States& states) {
    for (const auto& name : names)
        if (states.count(name) == 0)
            throw Found{where + " " + verb + " state " + in_quotes(name) + ", which does not exist"};
    require_distinct(names, where + " " + verb + " state ", " twice");
}

Names with_suffix(Names names, const std::string& suffix) {
    for (auto& name : names) name += suffix;
    return names;
}

/// Whether an input or output is what a host keeps of the state: all of it, its leading rows, or new rows.
bool fits(const TensorSpec& tensor, const StateSpec& state, bool input) {
    auto shape = state.shape;
    if (state.update == Update::append && tensor.shape.size() == shape.size()) {
        const auto axis = static_cast<std::size_t>(*state.time_axis);
        const auto& rows = tensor.shape[axis];
        const auto* word = std::get_if<std::string>(&rows);
        if (!input || (word != nullptr && word->rfind("context", 0) == 0)) shape[axis] = rows;
    }
    return tensor.dtype == state.dtype && tensor.shape == shape;
}

void check_states_fit(const GraphSpec& graph, const States& states, bool input) {
    States held;  // by the name of their tensor
    for (const auto& name : input ? graph.reads : graph.writes)
        held.emplace(name + (input ? ".in" : ".out"), states.at(name));
    for (const auto& tensor : input ? graph.inputs : graph.outputs) {
        const auto state = held.find(tensor.name);
        if (state != held.end() && !fits(tensor, *state->second, input))
            throw Found{"graph " + in_quotes(graph.name) + ", tensor " + in_quotes(tensor.name) + ", is " +
                        tensor.dtype + " " + shown(tensor.shape) + ", which its state is not"};
    }
}

/// Tokens, positions and logits have the shapes that a host gives and takes.
void check_token_shapes(const GraphSpec& graph, std::int64_t vocab_size) {
    const auto check = [&graph](const char* name, const std::vector<TensorSpec>& tensors,
                                const std::vector<Dim>& shape) {
        for (const auto& tensor : tensors)
            require(tensor.name != name || tensor.shape == shape, "graph " + in_quotes(graph.name) + " has " + name +
                                                                      " of shape " + shown(tensor.shape) + ", not " +
                                                                      shown(shape));
    };
    check("tokens", graph.inputs, {"batch", graph.tokens});
    check("position", graph.inputs, {"batch"});
    check("logits", graph.outputs, {"batch", graph.tokens, vocab_size});
}

void check_graph(const GraphSpec& graph, const States& states, std::int64_t vocab_size) {
    const auto where = "graph " + in_quotes(graph.name);
    check_states_of(where, "reads", graph.reads, states);
    check_states_of(where, "writes", graph.writes, states);
    check_named(where, "input", names_of(graph.inputs), with_suffix(graph.reads, ".in"));
    check_named(where, "output", names_of(graph.outputs), with_suffix(graph.writes, ".out"));
    for (const auto* tensors : {&graph.inputs, &graph.outputs})
        for (const auto& tensor : *tensors)
            check_tensor(where + ", tensor " + in_quotes(tensor.name) + ",", tensor.dtype, tensor.shape);
    for (const bool input : {true, false}) check_states_fit(graph, states, input);
    const auto& tokens = graph.tokens;
    const bool known = tokens == Dim(0) || tokens == Dim(1) || tokens == Dim("chunk");
    require(known, where + " consumes " + shown(tokens) + " tokens, not 0, 1 or 'chunk'");
    check_token_shapes(graph, vocab_size);
}

void check_due(const std::string& where, std::int64_t every, const Names& takers, const Schedule& schedule) {
    const bool prefills = schedule.prefill && contains(takers, *schedule.prefill);
    require(
        schedule.period() % every == 0 && (!prefills || schedule.chunk_multiple % every == 0),
        where + " comes every " + std::to_string(every) + " tokens, which must divide the period and chunk_multiple");
    std::int64_t phase = 0;
    for (const auto& tick : schedule.ticks) {
        const bool takes = std::any_of(tick.graphs.begin(), tick.graphs.end(),
                                       [&takers](const std::string& name) { return contains(takers, name); });
        // Of several phases in a row, at most the first can be the end of a chunk, unless every token is one.
        const auto wrong = (phase + 1) % every != 0 ? phase : phase + 1;
        require(!takes || every == 1 || ((phase + 1) % every == 0 && tick.repeat == 1),
                where + " is taken at phase " + std::to_string(wrong) + ", where no " + std::to_string(every) +
                    " tokens are complete");
        phase += tick.repeat;
    }
}

bool same_ring(const StateSpec& a, const StateSpec& b) {
    return a.dtype == b.dtype && a.shape == b.shape && a.update == b.update && a.time_axis == b.time_axis &&
           a.batch_axis == b.batch_axis;
}

void check_input(const HostInput& given, const StreamSpec& spec) {
    const auto where = "host input " + in_quotes(given.name);
    const bool positive = given.every >= 1 && std::all_of(given.shape.begin(), given.shape.end(),
                                                          [](std::int64_t size) { return size >= 1; });
    require(positive, where + " is " + shown(given.shape) + " every " + std::to_string(given.every) +
                          " tokens, which must all be at least 1");
    std::vector<Dim> shape(given.shape.begin(), given.shape.end());
    check_tensor(where, given.dtype, shape);
    shape.emplace_back(given.every);
    require(product(shape) <= kValuesLimit, where + " is " + shown(given.shape) + " every " +
                                                std::to_string(given.every) + " tokens, more than " +
                                                std::to_string(kValuesLimit) + " values");
    const bool whole = given.dtype.find("int") != std::string::npos;
    require(whole == given.below.has_value() && given.below.value_or(1) >= 1,
            where + " is " + given.dtype + " below " + (given.below ? std::to_string(*given.below) : "None") +
                ": whole numbers need a bound, others have none");
    const auto recent = given.recent();
    const bool held = std::any_of(spec.states.begin(), spec.states.end(), [&recent](const StateSpec& state) {
        return state.name == recent.name && same_ring(state, recent);
    });
    require(held, where + " has no state " + in_quotes(recent.name) + ", int64 (batch, " + std::to_string(given.every) +
                      "), to be asked for with");
    Names takers;
    for (const auto& graph : spec.graphs) {
        require(graph.tokens == Dim(0) || contains(graph.writes, recent.name),
                "graph " + in_quotes(graph.name) + " does not write state " + in_quotes(recent.name));
        for (const auto& tensor : graph.inputs) {
            if (tensor.name != given.name) continue;
            require(graph.tokens != Dim(0) && tensor == given.as_input(graph.tokens),
                    "graph " + in_quotes(graph.name) + " takes " + where + " as " + tensor.dtype + " " +
                        shown(tensor.shape));
            takers.push_back(graph.name);
        }
    }
    check_due(where, given.every, takers, spec.schedule);
}

void check_schedule(const Schedule& schedule, const Names& graphs) {
    const bool repeats =
        std::all_of(schedule.ticks.begin(), schedule.ticks.end(), [](const Tick& tick) { return 1 <= tick.repeat; });
    require(!schedule.ticks.empty() && repeats, "the schedule must have ticks, each repeated at least once");
    auto longest = std::max(schedule.chunk_multiple, schedule.max_chunk);
    std::int64_t period = 0;
    for (const auto& tick : schedule.ticks) {
        longest = std::max(longest, tick.repeat);
        if (longest <= kSizeLimit) longest = std::max(longest, period += tick.repeat);
    }
    require(longest <= kSizeLimit,
            "the period, chunk_multiple and max_chunk of the schedule must be at most " + std::to_string(kSizeLimit));
    Names used;
    for (const auto& tick : schedule.ticks)
        for (const auto* names : {&tick.graphs, &tick.closing}) used.insert(used.end(), names->begin(), names->end());
    if (schedule.prefill) used.push_back(*schedule.prefill);
    for (const auto& name : used)
        require(contains(graphs, name), "the schedule runs graph " + in_quotes(name) + ", which does not exist");
    require(!schedule.prefill || (1 <= schedule.chunk_multiple && schedule.chunk_multiple <= schedule.max_chunk),
            "the schedule has chunk_multiple " + std::to_string(schedule.chunk_multiple) + " and max_chunk " +
                std::to_string(schedule.max_chunk));
}

void check(const StreamSpec& spec) {
    const auto graphs = names_of(spec.graphs);
    const auto states = names_of(spec.states);
    for (const auto& [what, names] : {std::pair("graph", &graphs), std::pair("state", &states)}) {
        require_distinct(*names, "two " + std::string(what) + "s are named ", "");
        for (const auto& name : *names)
            if (auto fault = name_fault(what, name)) throw Found{*fault};
    }
    require(std::min({spec.vocab_size, spec.max_batch, spec.max_context.value_or(1)}) >= 1,
            "vocab_size, max_batch and max_context must be at least 1");
    require(spec.vocab_size <= kVocabLimit && std::max(spec.max_batch, spec.max_context.value_or(1)) <= kSizeLimit,
            "vocab_size must be at most " + std::to_string(kVocabLimit) + ", max_batch and max_context at most " +
                std::to_string(kSizeLimit));
    for (const auto& state : spec.states) check_state(state);
    States known;
    for (const auto& state : spec.states) known.emplace(state.name, &state);
    for (const auto& graph : spec.graphs) check_graph(graph, known, spec.vocab_size);
    check_schedule(spec.schedule, graphs);
    require_distinct(names_of(spec.inputs), "two host inputs are named ", "");
    for (const auto& given : spec.inputs) check_input(given, spec);
}

}  // namespace

std::optional<std::string> spec_fault(const StreamSpec& spec) {
    try {
        check(spec);
    } catch (const Found& found) {
        return found.sentence;
    }
    return std::nullopt;
}

std::optional<std::string> name_fault(const std::string& what, const std::string& name) {
    const bool odd = std::any_of(name.begin(), name.end(), [](char letter) {
        const auto byte = static_cast<unsigned char>(letter);
        return byte < 0x20 || byte == 0x7F || std::string_view("/\\:*?\"<>|").find(letter) != std::string_view::npos;
    });
    if (!odd && !name.empty() && name != "." && name != "..") return std::nullopt;
    return what + " name " + in_quotes(name) + " cannot be used in a file name";
}

}  // namespace mscompile
