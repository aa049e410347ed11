// What needs no bundle: random numbers, and a session on a backend whose failures and pauses the test decides. Its
// states lie where only the backend may touch them, as on a GPU: anything else ends the test with a segmentation fault.
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <functional>
#include <iostream>
#include <map>
#include <new>
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

/// Memory that is out of reach but for what an executor does.
class Pages {
  public:
    /// Within reach for as long as this lives.
    class Access {
      public:
        explicit Access(const Pages& pages) : pages_(pages) { pages_.protect(PROT_READ | PROT_WRITE); }
        Access(const Access&) = delete;
        Access& operator=(const Access&) = delete;
        ~Access() { pages_.protect(PROT_NONE); }

      private:
        const Pages& pages_;
    };

    void* add(std::size_t size) {
        size += size == 0 ? 1 : 0;
        void* memory = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        sizes_[memory] = size;
        return memory;
    }

    void remove(void* memory) {
        munmap(memory, sizes_.at(memory));
        sizes_.erase(memory);
    }

  private:
    void protect(int access) const {
        for (const auto& [memory, size] : sizes_) mprotect(memory, size, access);
    }

    std::map<void*, std::size_t> sizes_;
};

class CountingCall : public mscompile::BoundCall {
  public:
    CountingCall(const Pages& pages, std::vector<TensorView> inputs, std::vector<TensorView> outputs,
                 std::function<void()> before)
        : pages_(pages), inputs_(std::move(inputs)), outputs_(std::move(outputs)), before_(std::move(before)) {}

    void run() override {
        before_();
        const Pages::Access access(pages_);
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

    const Pages& pages_;
    std::vector<TensorView> inputs_;
    std::vector<TensorView> outputs_;
    std::function<void()> before_;
};

class CountingExecutor : public mscompile::Executor {
  public:
    explicit CountingExecutor(std::function<void()> before) : before_(std::move(before)) {}

    [[nodiscard]] std::unique_ptr<mscompile::BoundCall> bind(const std::string& /*graph*/,
                                                             const std::vector<TensorView>& inputs,
                                                             const std::vector<TensorView>& outputs) override {
        return std::make_unique<CountingCall>(pages_, inputs, outputs, before_);
    }

    [[nodiscard]] void* allocate(std::size_t size) override { return pages_.add(size); }
    void release(void* memory) noexcept override { pages_.remove(memory); }

    void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
              std::size_t rows) override {
        const Pages::Access access(pages_);
        Executor::copy(to, to_pitch, from, from_pitch, width, rows);
    }

    void upload(void* to, const void* from, std::size_t size) override {
        const Pages::Access access(pages_);
        Executor::upload(to, from, size);
    }

    void download(void* to, const void* from, std::size_t size) override {
        const Pages::Access access(pages_);
        Executor::download(to, from, size);
    }

  private:
    Pages pages_;
    std::function<void()> before_;
};

class CountingBackend : public mscompile::Backend {
  public:
    explicit CountingBackend(std::function<void()> before = [] {}) : before_(std::move(before)) {}

    [[nodiscard]] std::unique_ptr<mscompile::Executor> executor(std::int64_t /*batch*/) const override {
        return std::make_unique<CountingExecutor>(before_);
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

void test_states_beyond_memory() {
    auto spec = counting_spec();
    for (auto& state : spec.states) state.shape.insert(state.shape.end(), {1 << 30, 1 << 10});
    try {
        const Session session(std::make_shared<mscompile::StreamSpec>(spec), std::make_shared<CountingBackend>());
        check(false, "states of terabytes were accepted");
    } catch (const Error& error) {
        const std::string sentence = error.what();
        check(sentence.rfind("the states of 1 streams take 17592186044416 bytes, and there are ", 0) == 0, sentence);
        check(error.exit_code() == 2, "it is the input that is wrong");
    }
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
    test_states_beyond_memory();
    test_step_after_failure();
    test_two_threads();
    test_random_numbers();
    return failures == 0 ? 0 : 1;
}
