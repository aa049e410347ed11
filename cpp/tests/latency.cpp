// Times steps of one token, for benchmarks/cpp_overhead.py:
//
//   latency BUNDLE session|bare POSITION < NUMBERS
//
// It first consumes POSITION tokens. For each number on stdin it then takes so many steps and writes a line: for each
// step the nanoseconds of all of it, and of those the ones inside the runtime. `bare` repeats the runtime's calls of
// such steps, with the session's own tensors, and does nothing else.
#include <chrono>
#include <iostream>

#include "mscompile/mscompile.hpp"

namespace {

using namespace mscompile;
using Clock = std::chrono::steady_clock;

std::int64_t since(Clock::time_point begun) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begun).count();
}

/// What the runtime was asked for since it was last cleared.
struct Journal {
    std::int64_t nanoseconds = 0;
    std::vector<BoundCall*> calls;
};

class TimedCall : public BoundCall {
  public:
    TimedCall(std::unique_ptr<BoundCall> call, Journal& journal) : call_(std::move(call)), journal_(journal) {}

    void run() override {
        const auto begun = Clock::now();
        call_->run();
        journal_.nanoseconds += since(begun);
        journal_.calls.push_back(this);
    }

  private:
    std::unique_ptr<BoundCall> call_;
    Journal& journal_;
};

class TimedExecutor : public Executor {
  public:
    TimedExecutor(std::unique_ptr<Executor> executor, Journal& journal)
        : executor_(std::move(executor)), journal_(journal) {}

    [[nodiscard]] std::unique_ptr<BoundCall> bind(const std::string& graph, const std::vector<TensorView>& inputs,
                                                  const std::vector<TensorView>& outputs) override {
        return std::make_unique<TimedCall>(executor_->bind(graph, inputs, outputs), journal_);
    }

    [[nodiscard]] void* allocate(std::size_t size) override { return executor_->allocate(size); }
    void release(void* memory) noexcept override { executor_->release(memory); }
    void copy(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
              std::size_t rows) override {
        executor_->copy(to, to_pitch, from, from_pitch, width, rows);
    }
    void upload(void* to, const void* from, std::size_t size) override { executor_->upload(to, from, size); }
    void download(void* to, const void* from, std::size_t size) override { executor_->download(to, from, size); }

  private:
    std::unique_ptr<Executor> executor_;
    Journal& journal_;
};

class TimedBackend : public Backend {
  public:
    TimedBackend(std::shared_ptr<const Backend> backend, Journal& journal)
        : backend_(std::move(backend)), journal_(journal) {}

    [[nodiscard]] std::unique_ptr<Executor> executor(std::int64_t batch) const override {
        return std::make_unique<TimedExecutor>(backend_->executor(batch), journal_);
    }

  private:
    std::shared_ptr<const Backend> backend_;
    Journal& journal_;
};

/// One stream of tokens that differ from step to step.
class Stream {
  public:
    Stream(Bundle& bundle, std::int64_t position)
        : vocab_(bundle.spec().vocab_size),
          session_(std::make_shared<StreamSpec>(bundle.spec()),
                   std::make_shared<TimedBackend>(bundle.backend(), journal_)) {
        if (position > 0) session_.step(std::vector<std::int64_t>(static_cast<std::size_t>(position), 1));
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    /// What the runtime did for one more token.
    const Journal& step() {
        journal_ = {};
        token_ = (token_ + 7) % vocab_;
        session_.step(&token_, 1);
        return journal_;
    }

  private:
    Journal journal_;
    std::int64_t vocab_;
    std::int64_t token_ = 0;
    Session session_;
};

void time_session(Stream& stream, int count) {
    for (int i = 0; i < count; ++i) {
        const auto begun = Clock::now();
        const auto inside = stream.step().nanoseconds;
        std::cout << since(begun) << " " << inside << " ";
    }
}

void time_bare(const std::vector<std::vector<BoundCall*>>& steps, int count) {
    for (int i = 0; i < count; ++i) {
        const auto begun = Clock::now();
        for (auto* call : steps[static_cast<std::size_t>(i) % steps.size()]) call->run();
        const auto all = since(begun);
        std::cout << all << " " << all << " ";
    }
}

int run(const std::string& path, bool bare, std::int64_t position) {
    auto bundle = Bundle::open(path, false);
    Stream stream(bundle, position);
    std::vector<std::vector<BoundCall*>> steps;  // of a period and of both buffers of each state
    for (std::int64_t i = 0; i < 2 * bundle.spec().schedule.period(); ++i) steps.push_back(stream.step().calls);
    for (int count = 0; std::cin >> count;) {
        if (bare) time_bare(steps, count);
        if (!bare) time_session(stream, count);
        std::cout << std::endl;
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    try {
        return run(argv[1], std::string(argv[2]) == "bare", std::stoll(argv[3]));
    } catch (const mscompile::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.exit_code();
    }
}
