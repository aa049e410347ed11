// Rows normally share their phase. Where resets have put them out of phase, each distinct tick runs once for the
// whole batch and only the rows it is meant for keep its results.
#include "mscompile/session.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <optional>

#include "buffers.hpp"
#include "memory.hpp"
#include "supply.hpp"
#include "text.hpp"

namespace mscompile {

namespace {

constexpr const char* kTokens = "tokens";
constexpr const char* kPosition = "position";
constexpr const char* kLogits = "logits";

/// What one call keeps of a state: `rows` new rows of a ring, or the whole of a replaced state.
struct Written {
    Buffer* state;
    const std::byte* output;
    std::int64_t rows;
};

struct Supplied {
    const Supply* supply;
    std::byte* entries;
    std::int64_t slots;
};

/// One graph with its memory, for calls of so many tokens.
struct Bound {
    std::int64_t tokens_per_call = 1;
    bool lasting = true;                      // reads no copy of a state
    std::vector<const std::byte*> addresses;  // of the replaced states it touches, when it was bound
    std::vector<Memory> owned;
    std::vector<Resident> resident;
    std::int64_t* tokens = nullptr;
    std::int64_t* position = nullptr;
    const float* logits = nullptr;
    std::vector<Supplied> supplied;
    std::vector<Written> written;
    std::unique_ptr<BoundCall> call;
};

struct Graph {
    const GraphSpec* spec;
    std::vector<const Buffer*> replaced;  // the states whose addresses change
    std::vector<std::unique_ptr<Bound>> single;
    std::unique_ptr<Bound> many;
};

/// Lets one thread in at a time.
class Turn {
  public:
    explicit Turn(std::atomic_flag& busy) : busy_(busy) {
        if (busy_.test_and_set(std::memory_order_acquire))
            throw Error(Fault::input,
                        "this session is in use by another thread; give each thread a session of its own");
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { busy_.clear(std::memory_order_release); }

  private:
    std::atomic_flag& busy_;
};

void check_batch(const StreamSpec& spec, std::int64_t batch) {
    if (batch < 1 || batch > spec.max_batch)
        throw Error(Fault::input, "batch " + std::to_string(batch) + " is outside this engine's profile of 1 to " +
                                      std::to_string(spec.max_batch) + "; export again with --batch 1:" +
                                      std::to_string(std::max<std::int64_t>(batch, 1)));
}

void check_memory(const StreamSpec& spec, std::int64_t batch) {
    double needed = 0;
    for (const auto& state : spec.states) {
        double size = static_cast<double>(item_size(state.dtype)) * static_cast<double>(batch);
        for (const auto dim : state.concrete(1)) size *= static_cast<double>(dim);
        needed += size;
    }
    const double given = memory_size();
    const auto whole = [](double number) {
        const auto digits = std::to_string(number);
        return digits.substr(0, digits.find('.'));
    };
    if (needed > given)
        throw Error(Fault::input, "the states of " + std::to_string(batch) + " streams take " + whole(needed) +
                                      " bytes, and there are " + whole(given) +
                                      " bytes of memory; use a smaller batch, or a model that remembers less");
}

/// Whether `shape` is that of the state, up to the rows of its time axis where `any_rows` holds.
bool fits(const Shape& shape, const Buffer& state, bool any_rows) {
    if (shape.size() != state.shape().size()) return false;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        const bool free = any_rows && state.spec().time_axis == static_cast<std::int64_t>(axis);
        if (!free && shape[axis] != state.shape()[axis]) return false;
    }
    return true;
}

void require(bool holds, const GraphSpec& graph, const TensorSpec& tensor) {
    if (!holds)
        throw Error(Fault::bundle, "graph " + in_quotes(graph.name) + ", tensor " + in_quotes(tensor.name) + " is " +
                                       tensor.dtype + " " + shown(tensor.shape) +
                                       ", which does not fit the rest of the manifest; export the bundle again");
}

}  // namespace

class Session::Host {
  public:
    Host(std::shared_ptr<const StreamSpec> spec, std::shared_ptr<const Backend> backend, std::int64_t batch,
         const Sources& sources);

    [[nodiscard]] std::int64_t batch() const { return batch_; }
    [[nodiscard]] std::int64_t vocab_size() const { return spec_->vocab_size; }
    [[nodiscard]] std::vector<std::int64_t> position() const { return position_; }
    Logits step(const std::int64_t* tokens, std::int64_t count);
    [[nodiscard]] Snapshot snapshot() const;
    void restore(const Snapshot& snapshot);
    void reset();
    void reset(const std::vector<std::int64_t>& rows);

  private:
    void check_tokens(const std::int64_t* tokens, std::int64_t count) const;
    void check_context(std::int64_t count) const;
    Logits consume(const std::int64_t* tokens, std::int64_t count);
    void consume_out_of_phase(const std::int64_t* tokens, std::int64_t count, std::int64_t done);
    [[nodiscard]] bool in_phase() const;
    const float* run(const ScheduledCall& call, const std::int64_t* tokens, std::int64_t count, const Rows& rows);
    void feed(Bound& bound, const std::int64_t* tokens, std::int64_t count);
    static void keep_states(Bound& bound, const Rows& rows);
    void keep_logits(const float* logits, std::int64_t tokens, std::int64_t count, std::int64_t done, const Rows& rows);
    Bound& bound(Graph& graph, std::int64_t tokens);
    std::unique_ptr<Bound> bind(const Graph& graph, std::int64_t tokens);
    TensorView input(Bound& bound, const GraphSpec& graph, const TensorSpec& tensor, const Sizes& sizes);
    TensorView output(Bound& bound, const GraphSpec& graph, const TensorSpec& tensor, const Sizes& sizes);
    static TensorView state_input(Bound& bound, const Buffer& state, TensorView view);
    TensorView state_output(Bound& bound, Buffer& state, TensorView view);
    static TensorView own(Bound& bound, TensorView view);
    Buffer* state_of(const std::vector<std::string>& names, const TensorSpec& tensor, const std::string& suffix);
    void reset_row(std::int64_t row);

    std::shared_ptr<const StreamSpec> spec_;
    std::shared_ptr<const Backend> backend_;
    std::unique_ptr<Executor> executor_;  // outlives what lies in its memory
    std::int64_t batch_;
    std::map<std::string, Buffer> states_;
    std::vector<Supply> supplies_;
    std::map<std::string, Graph> graphs_;
    std::vector<std::int64_t> position_;
    std::vector<float> logits_;
    bool failed_ = false;
    mutable std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
};

Session::Host::Host(std::shared_ptr<const StreamSpec> spec, std::shared_ptr<const Backend> backend, std::int64_t batch,
                    const Sources& sources)
    : spec_(std::move(spec)), backend_(std::move(backend)), batch_(batch) {
    check_batch(*spec_, batch);
    supplies_ = supplies(spec_->inputs, sources);
    check_memory(*spec_, batch);
    executor_ = backend_->executor(batch);
    try {
        for (const auto& state : spec_->states) states_.emplace(state.name, Buffer(state, batch, *executor_));
    } catch (const std::bad_alloc&) {
        throw Error(Fault::engine, "the states of " + std::to_string(batch) +
                                       " streams need more memory than there is; open a session of fewer");
    }
    for (const auto& graph : spec_->graphs) {
        Graph entry{&graph, {}, {}, nullptr};
        for (const auto* names : {&graph.reads, &graph.writes})
            for (const auto& name : *names)
                if (!states_.at(name).is_ring()) entry.replaced.push_back(&states_.at(name));
        graphs_.emplace(graph.name, std::move(entry));
    }
    position_.assign(static_cast<std::size_t>(batch), 0);
}

Logits Session::Host::step(const std::int64_t* tokens, std::int64_t count) {
    const Turn turn(busy_);
    check_tokens(tokens, count);
    check_context(count);
    if (failed_)
        throw Error(Fault::engine, "an earlier step failed, so the state is unknown: reset() or restore() first");
    for (auto& supply : supplies_) {
        const auto recent = states_.at(supply.given().name + ".recent").bytes();
        supply.ask(reinterpret_cast<const std::int64_t*>(recent.data()), position_, tokens, count);
    }
    failed_ = true;
    try {
        const auto logits = consume(tokens, count);
        failed_ = false;
        return logits;
    } catch (const std::bad_alloc&) {
        throw Error(Fault::engine, "a step of " + std::to_string(count) +
                                       " tokens needs more memory than there is; feed fewer at a time");
    }
}

void Session::Host::check_tokens(const std::int64_t* tokens, std::int64_t count) const {
    if (count < 1)
        throw Error(Fault::input, "tokens must have shape (batch=" + std::to_string(batch_) + ", T >= 1), not " +
                                      shown(Shape{batch_, count}));
    const auto [low, high] = std::minmax_element(tokens, tokens + batch_ * count);
    if (*low >= 0 && *high < spec_->vocab_size) return;
    throw Error(Fault::input, "token id " + std::to_string(*low < 0 ? *low : *high) +
                                  " is out of range: this model knows ids 0 to " +
                                  std::to_string(spec_->vocab_size - 1));
}

void Session::Host::check_context(std::int64_t count) const {
    if (!spec_->max_context) return;
    const auto limit = *spec_->max_context;
    for (std::size_t row = 0; row < position_.size(); ++row)
        if (count > limit - position_[row])
            throw Error(Fault::input, "row " + std::to_string(row) + " has consumed " + std::to_string(position_[row]) +
                                          " tokens and " + std::to_string(count) + " more exceed the context of " +
                                          std::to_string(limit) +
                                          "; reset the row, or export again with a larger --context");
}

Logits Session::Host::consume(const std::int64_t* tokens, std::int64_t count) {
    std::int64_t done = 0;
    while (done < count) {
        if (!in_phase()) {
            consume_out_of_phase(tokens, count, done++);
            continue;
        }
        const auto call = spec_->schedule.next_call(position_.front(), count - done);
        const auto* logits = run(call, tokens + done, count, {});
        if (call.tokens == count) return {logits, batch_, count, spec_->vocab_size};
        keep_logits(logits, call.tokens, count, done, {});
        done += call.tokens;
    }
    return {logits_.data(), batch_, count, spec_->vocab_size};
}

void Session::Host::consume_out_of_phase(const std::int64_t* tokens, std::int64_t count, std::int64_t done) {
    std::vector<ScheduledCall> calls;
    for (const auto position : position_) calls.push_back(spec_->schedule.next_call(position, 1));
    for (std::size_t row = 0; row < calls.size(); ++row) {
        if (std::find(calls.begin(), calls.end(), calls[row]) != calls.begin() + static_cast<std::ptrdiff_t>(row))
            continue;
        Rows rows;
        for (const auto& call : calls) rows.push_back(call == calls[row]);
        keep_logits(run(calls[row], tokens + done, count, rows), 1, count, done, rows);
    }
}

bool Session::Host::in_phase() const {
    const auto period = spec_->schedule.period();
    const auto phase = position_.front() % period;
    return std::all_of(position_.begin(), position_.end(),
                       [=](std::int64_t position) { return position % period == phase; });
}

/// The logits (batch, call.tokens, vocab), in the output of the graph that has them. Of each row of `tokens`, which
/// are `count` apart, the first call.tokens are consumed.
const float* Session::Host::run(const ScheduledCall& call, const std::int64_t* tokens, std::int64_t count,
                                const Rows& rows) {
    const float* logits = nullptr;
    for (const auto& name : call.graphs) {
        auto& graph = bound(graphs_.at(name), call.tokens);
        feed(graph, tokens, count);
        graph.call->run();
        if (graph.logits != nullptr) logits = graph.logits;
        keep_states(graph, rows);
    }
    if (logits == nullptr) throw Error(Fault::bundle, "no graph of a tick has logits; export the bundle again");
    for (std::size_t row = 0; row < position_.size(); ++row)
        if (rows.empty() || rows[row]) position_[row] += call.tokens;
    return logits;
}

void Session::Host::feed(Bound& bound, const std::int64_t* tokens, std::int64_t count) {
    const auto taken = bound.tokens_per_call;
    if (bound.tokens != nullptr)
        for (std::int64_t row = 0; row < batch_; ++row)
            std::copy_n(tokens + row * count, taken, bound.tokens + row * taken);
    if (bound.position != nullptr) std::copy(position_.begin(), position_.end(), bound.position);
    for (const auto& [supply, entries, slots] : bound.supplied) supply->fill(entries, slots, position_, taken);
}

void Session::Host::keep_states(Bound& bound, const Rows& rows) {
    for (const auto& [state, output, added] : bound.written) {
        if (state->is_ring()) state->append(output, added, rows);
        if (!state->is_ring()) state->swap(rows);
    }
}

/// Copies the logits of one of several calls of a step.
void Session::Host::keep_logits(const float* logits, std::int64_t tokens, std::int64_t count, std::int64_t done,
                                const Rows& rows) {
    const auto vocab = spec_->vocab_size;
    const auto size = byte_size("float32", {batch_, count, vocab}) / sizeof(float);
    if (logits_.size() < size) logits_.resize(size);
    for (std::int64_t row = 0; row < batch_; ++row)
        if (rows.empty() || rows[static_cast<std::size_t>(row)])
            std::copy_n(logits + row * tokens * vocab, tokens * vocab, logits_.data() + (row * count + done) * vocab);
}

/// The call of a graph, made anew only where tokens or addresses are not those of an earlier one.
Bound& Session::Host::bound(Graph& graph, std::int64_t tokens) {
    const auto serves = [&](const std::unique_ptr<Bound>& bound) {
        if (!bound || !bound->lasting || bound->tokens_per_call != tokens) return false;
        for (std::size_t i = 0; i < graph.replaced.size(); ++i)
            if (bound->addresses[i] != graph.replaced[i]->value()) return false;
        return true;
    };
    if (tokens == 1) {
        const auto found = std::find_if(graph.single.begin(), graph.single.end(), serves);
        if (found != graph.single.end()) return **found;
        graph.single.push_back(bind(graph, 1));
        return *graph.single.back();
    }
    if (!serves(graph.many)) graph.many = bind(graph, tokens);
    return *graph.many;
}

std::unique_ptr<Bound> Session::Host::bind(const Graph& graph, std::int64_t tokens) {
    auto bound = std::make_unique<Bound>();
    bound->tokens_per_call = tokens;
    for (const auto* state : graph.replaced) bound->addresses.push_back(state->value());
    const auto longest = *std::max_element(position_.begin(), position_.end());
    const Sizes sizes{batch_, tokens, std::max(longest, spec_->schedule.chunk_multiple)};
    std::vector<TensorView> inputs;
    std::vector<TensorView> outputs;
    for (const auto& tensor : graph.spec->inputs) inputs.push_back(input(*bound, *graph.spec, tensor, sizes));
    for (const auto& tensor : graph.spec->outputs) outputs.push_back(output(*bound, *graph.spec, tensor, sizes));
    bound->call = executor_->bind(graph.spec->name, inputs, outputs);
    return bound;
}

TensorView Session::Host::input(Bound& bound, const GraphSpec& graph, const TensorSpec& tensor, const Sizes& sizes) {
    TensorView view{tensor.name, tensor.dtype, tensor.concrete(sizes), nullptr};
    if (const auto* state = state_of(graph.reads, tensor, ".in")) {
        require(tensor.dtype == state->spec().dtype && fits(view.shape, *state, true), graph, tensor);
        return state_input(bound, *state, view);
    }
    view = own(bound, view);
    if (tensor.name == kTokens) {
        require(tensor.dtype == "int64" && view.shape == Shape{batch_, sizes.chunk}, graph, tensor);
        bound.tokens = static_cast<std::int64_t*>(view.data);
    } else if (tensor.name == kPosition) {
        require(tensor.dtype == "int64" && view.shape == Shape{batch_}, graph, tensor);
        bound.position = static_cast<std::int64_t*>(view.data);
    }
    for (const auto& supply : supplies_)
        if (supply.given().name == tensor.name)
            bound.supplied.push_back({&supply, static_cast<std::byte*>(view.data), view.shape[1]});
    return view;
}

/// The state itself, or a copy of its leading rows.
TensorView Session::Host::state_input(Bound& bound, const Buffer& state, TensorView view) {
    if (state.spec().time_axis) {
        const auto axis = static_cast<std::size_t>(*state.spec().time_axis);
        view.shape[axis] = std::min(view.shape[axis], state.shape()[axis]);
    }
    view.resident = true;
    if (view.shape == state.shape()) {
        view.data = const_cast<std::byte*>(state.value());  // backends do not write inputs
        return view;
    }
    bound.resident.push_back(state.leading(view.shape));
    bound.lasting = false;
    view.data = bound.resident.back().data();
    return view;
}

TensorView Session::Host::output(Bound& bound, const GraphSpec& graph, const TensorSpec& tensor, const Sizes& sizes) {
    TensorView view{tensor.name, tensor.dtype, tensor.concrete(sizes), nullptr};
    if (auto* state = state_of(graph.writes, tensor, ".out")) {
        require(tensor.dtype == state->spec().dtype && fits(view.shape, *state, state->is_ring()), graph, tensor);
        return state_output(bound, *state, view);
    }
    view = own(bound, view);
    if (tensor.name == kLogits) {
        const Shape wanted{batch_, sizes.chunk, spec_->vocab_size};
        require(tensor.dtype == "float32" && view.shape == wanted, graph, tensor);
        bound.logits = static_cast<const float*>(view.data);
    }
    return view;
}

/// The second buffer of the state, or room for the new rows of a ring.
TensorView Session::Host::state_output(Bound& bound, Buffer& state, TensorView view) {
    view.resident = true;
    if (state.is_ring()) bound.resident.emplace_back(*executor_, byte_size(view.dtype, view.shape));
    view.data = state.is_ring() ? bound.resident.back().data() : state.spare();
    const auto axis = static_cast<std::size_t>(state.spec().time_axis.value_or(0));
    bound.written.push_back({&state, static_cast<std::byte*>(view.data), view.shape[axis]});
    return view;
}

TensorView Session::Host::own(Bound& bound, TensorView view) {
    bound.owned.emplace_back(byte_size(view.dtype, view.shape));
    view.data = bound.owned.back().data();
    return view;
}

Buffer* Session::Host::state_of(const std::vector<std::string>& names, const TensorSpec& tensor,
                                const std::string& suffix) {
    const auto found =
        std::find_if(names.begin(), names.end(), [&](const std::string& name) { return tensor.name == name + suffix; });
    return found == names.end() ? nullptr : &states_.at(*found);
}

Snapshot Session::Host::snapshot() const {
    const Turn turn(busy_);
    Snapshot snapshot{position_, {}};
    for (const auto& [name, state] : states_) snapshot.states.emplace(name, state.saved());
    return snapshot;
}

void Session::Host::restore(const Snapshot& snapshot) {
    const Turn turn(busy_);
    const bool same = snapshot.states.size() == states_.size() &&
                      std::equal(states_.begin(), states_.end(), snapshot.states.begin(),
                                 [](const auto& mine, const auto& saved) { return mine.first == saved.first; });
    if (!same) throw Error(Fault::input, "the snapshot is of another model: its states have other names");
    for (const auto& [name, state] : states_) {
        const auto& saved = snapshot.states.at(name);
        const bool whole = saved.bytes.size() == byte_size(state.spec().dtype, state.shape()) &&
                           saved.written.size() == (state.is_ring() ? position_.size() : 0);
        if (saved.shape != state.shape() || !whole || snapshot.position.size() != position_.size())
            throw Error(Fault::input, "the snapshot's " + name + " has shape " + shown(saved.shape) +
                                          ", this session's " + shown(state.shape()));
    }
    for (auto& [name, state] : states_) state.restore(snapshot.states.at(name));
    position_ = snapshot.position;
    failed_ = false;
}

void Session::Host::reset() {
    const Turn turn(busy_);
    for (std::int64_t row = 0; row < batch_; ++row) reset_row(row);
    failed_ = false;
}

void Session::Host::reset(const std::vector<std::int64_t>& rows) {
    const Turn turn(busy_);
    std::vector<std::string> shown_rows;
    for (const auto row : rows) shown_rows.push_back(std::to_string(row));
    for (const auto row : rows)
        if (row < 0 || row >= batch_)
            throw Error(Fault::input, "rows [" + join(shown_rows) + "] are outside this session's batch of " +
                                          std::to_string(batch_));
    for (const auto row : rows) reset_row(row);
}

void Session::Host::reset_row(std::int64_t row) {
    for (auto& [name, state] : states_) state.reset(row);
    position_[static_cast<std::size_t>(row)] = 0;
}

Session::Session(std::shared_ptr<const StreamSpec> spec, std::shared_ptr<const Backend> backend, std::int64_t batch,
                 const Sources& sources)
    : host_(std::make_unique<Host>(std::move(spec), std::move(backend), batch, sources)) {}

Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
Session::~Session() = default;

std::int64_t Session::batch() const { return host_->batch(); }
std::int64_t Session::vocab_size() const { return host_->vocab_size(); }
std::vector<std::int64_t> Session::position() const { return host_->position(); }
Logits Session::step(const std::int64_t* tokens, std::int64_t count) { return host_->step(tokens, count); }

Logits Session::step(const std::vector<std::int64_t>& tokens) {
    const auto size = static_cast<std::int64_t>(tokens.size());
    if (size % batch() != 0)
        throw Error(Fault::input, "tokens must have shape (batch=" + std::to_string(batch()) + ", T >= 1), not " +
                                      shown(Shape{size}));
    return host_->step(tokens.data(), size / batch());
}

Snapshot Session::snapshot() const { return host_->snapshot(); }
void Session::restore(const Snapshot& snapshot) { host_->restore(snapshot); }
void Session::reset() { host_->reset(); }
void Session::reset(const std::vector<std::int64_t>& rows) { host_->reset(rows); }

}  // namespace mscompile
