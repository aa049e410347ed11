// What needs no bundle: random numbers, and a session on a backend whose failures and pauses the test decides.
#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <iostream>
#include <thread>

#include "mscompile/mscompile.hpp"

namespace {

using mscompile::Error;
using mscompile::Session;
using mscompile::TensorView;

int failures = 0;

void check(bool holds, const std::string& what) {
    if (holds) return;
    ++failures;
    std::cerr << "failed: " << what << "\n";
}

void check_error(const std::function<void()>& call, const std::string& sentence) {
    try {
        call();
        check(false, "no error, where one was due: " + sentence);
    } catch (const Error& error) {
        check(error.what() == sentence, std::string(error.what()) + "\n  instead of: " + sentence);
    }
}

/// Counts tokens in a replaced state, and keeps the last three of them in a ring; logits are (count, ring sum).
mscompile::StreamSpec counting_spec() {
    mscompile::StateSpec count{"count", "float32", {"batch"}, mscompile::Update::replace, {}, 0, {7.0}, false};
    mscompile::StateSpec last{"last", "float32", {3, "batch"}, mscompile::Update::append, 0, 1, {0.0}, false};
    mscompile::GraphSpec graph;
    graph.name = "one";
    graph.inputs = {{"tokens", "int64", {"batch", 1}},
                    {"position", "int64", {"batch"}},
                    {"count.in", "float32", {"batch"}},
                    {"last.in", "float32", {3, "batch"}}};
    graph.outputs = {{"logits", "float32", {"batch", 1, 10}},
                     {"count.out", "float32", {"batch"}},
                     {"last.out", "float32", {1, "batch"}}};
    graph.reads = graph.writes = {"count", "last"};
    graph.tokens = 1;
    mscompile::StreamSpec spec;
    spec.states = {count, last};
    spec.graphs = {graph};
    spec.schedule.ticks = {{{"one"}, {}, 1}};
    spec.vocab_size = 10;
    spec.max_batch = 4;
    spec.max_context = 100;
    return spec;
}

class CountingCall : public mscompile::BoundCall {
  public:
    CountingCall(std::vector<TensorView> inputs, std::vector<TensorView> outputs, std::function<void()> before)
        : inputs_(std::move(inputs)), outputs_(std::move(outputs)), before_(std::move(before)) {}

    void run() override {
        before_();
        const auto batch = inputs_[1].shape[0];
        for (std::int64_t row = 0; row < batch; ++row) {
            const float* last = in<float>(3);
            out(1)[row] = in<float>(2)[row] + 1;
            out(2)[row] = static_cast<float>(in<std::int64_t>(0)[row]);
            out(0)[10 * row] = out(1)[row];
            out(0)[10 * row + 1] = last[row] + last[batch + row] + last[2 * batch + row];
        }
    }

  private:
    template <class Number>
    const Number* in(std::size_t index) {
        return static_cast<const Number*>(inputs_[index].data);
    }
    float* out(std::size_t index) { return static_cast<float*>(outputs_[index].data); }

    std::vector<TensorView> inputs_;
    std::vector<TensorView> outputs_;
    std::function<void()> before_;
};

class CountingBackend : public mscompile::Backend {
  public:
    explicit CountingBackend(std::function<void()> before = [] {}) : before_(std::move(before)) {}

    [[nodiscard]] std::unique_ptr<mscompile::BoundCall> bind(const std::string& /*graph*/,
                                                             const std::vector<TensorView>& inputs,
                                                             const std::vector<TensorView>& outputs) const override {
        return std::make_unique<CountingCall>(inputs, outputs, before_);
    }

  private:
    std::function<void()> before_;
};

Session counting_session(std::int64_t batch, std::function<void()> before = [] {}) {
    return {std::make_shared<mscompile::StreamSpec>(counting_spec()),
            std::make_shared<CountingBackend>(std::move(before)), batch};
}

void test_states() {
    auto session = counting_session(2);
    const auto logits = session.step({1, 2, 3, 4, 5, 6, 7, 8});  // (2, 4)
    check(logits.at(0, 3)[0] == 11 && logits.at(1, 3)[0] == 11, "a replaced state counts from its initial value");
    check(logits.at(0, 3)[1] == 6 && logits.at(1, 3)[1] == 18, "a ring holds what was appended");
    const auto saved = session.snapshot();
    session.reset({1});
    const auto after = session.step({9, 9});
    check(after.at(0, 0)[0] == 12 && after.at(1, 0)[0] == 8, "one row begins anew");
    check(after.at(0, 0)[1] == 9 && after.at(1, 0)[1] == 0, "a ring of three drops the oldest row, a new one is empty");
    session.restore(saved);
    check(session.position() == std::vector<std::int64_t>{4, 4}, "restore brings positions back");
    check(session.step({9, 9}).at(1, 0)[1] == 6 + 7 + 8, "restore brings rings back");
}

void test_bad_input() {
    auto session = counting_session(2);
    check_error([&] { session.step({1}); }, "tokens must have shape (batch=2, T >= 1), not (1,)");
    check_error([&] { session.step(std::vector<std::int64_t>{}); },
                "tokens must have shape (batch=2, T >= 1), not (2, 0)");
    check_error([&] { session.step({1, 10}); }, "token id 10 is out of range: this model knows ids 0 to 9");
    check_error([&] { session.step({-1, 10}); }, "token id -1 is out of range: this model knows ids 0 to 9");
    check_error([&] { session.reset({0, 2}); }, "rows [0, 2] are outside this session's batch of 2");
    check_error([&] { session.step(std::vector<std::int64_t>(202, 1)); },
                "row 0 has consumed 0 tokens and 101 more exceed the context of 100; reset the row, or export again "
                "with a larger --context");
    check_error([] { counting_session(5); },
                "batch 5 is outside this engine's profile of 1 to 4; export again with --batch 1:5");
    check_error([] { counting_session(0); },
                "batch 0 is outside this engine's profile of 1 to 4; export again with --batch 1:1");
    check(session.position() == std::vector<std::int64_t>{0, 0}, "what is refused consumes nothing");
    auto other = counting_session(1);
    check_error([&] { other.restore(session.snapshot()); }, "the snapshot's count has shape (2,), this session's (1,)");
    check_error([&] { mscompile::generate(other, {1}, 5, {-1.0, 0}); },
                "temperature must be 0 (greedy) or more, not -1.0");
}

void test_step_after_failure() {
    bool fails = true;
    auto session = counting_session(1, [&fails] {
        if (fails) throw Error(mscompile::Fault::engine, "it failed");
    });
    check_error([&] { session.step({1}); }, "it failed");
    fails = false;
    const std::string unknown = "an earlier step failed, so the state is unknown: reset() or restore() first";
    check_error([&] { session.step({1}); }, unknown);
    session.reset({0});
    check_error([&] { session.step({1}); }, unknown);
    session.reset();
    check(session.step({1}).at(0, 0)[0] == 8, "a session works again after reset()");
}

void test_two_threads() {
    std::atomic<bool> inside{false};
    std::atomic<bool> leave{false};
    auto session = counting_session(1, [&] {
        inside = true;
        while (!leave) std::this_thread::yield();
    });
    std::thread first([&session] { session.step({1}); });
    while (!inside) std::this_thread::yield();
    const std::string busy = "this session is in use by another thread; give each thread a session of its own";
    check_error([&] { session.step({1}); }, busy);
    check_error([&] { session.reset(); }, busy);
    check_error([&] { static_cast<void>(session.snapshot()); }, busy);
    leave = true;
    first.join();
    check(session.step({1}).at(0, 0)[0] == 9, "the other thread's step was taken");
}

/// numpy 2: `default_rng(seed).random(3)`.
void test_random_numbers() {
    const std::pair<std::uint64_t, std::array<double, 3>> known[] = {
        {0, {0.6369616873214543, 0.2697867137638703, 0.04097352393619469}},
        {1, {0.5118216247002567, 0.9504636963259353, 0.14415961271963373}},
        {8589934597U, {0.23772096442823154, 0.42782131249807576, 0.5914133521906731}},
        {18446744073709551615U, {0.6800266789616931, 0.8453117585624743, 0.007403081599260064}},
    };
    for (const auto& [seed, numbers] : known) {
        mscompile::Random random(seed);
        for (const auto number : numbers) check(random.uniform() == number, "a number of seed " + std::to_string(seed));
    }
    check(mscompile::Random({}).uniform() != mscompile::Random({}).uniform(), "no seed, other numbers each time");
}

}  // namespace

int main() {
    test_states();
    test_bad_input();
    test_step_after_failure();
    test_two_threads();
    test_random_numbers();
    return failures == 0 ? 0 : 1;
}
