// Any text as a manifest: it is refused with an Error, or what it describes can be walked without a fault.
#include <cstring>

#include "mscompile/bundle.hpp"

namespace {

using namespace mscompile;

constexpr std::int64_t kSmall = 1 << 16;  // elements that are worth allocating here
constexpr std::int64_t kTokens = 5;

/// Writes zeros, as an engine that works would write something.
class Zeros : public BoundCall {
  public:
    explicit Zeros(std::vector<TensorView> outputs) : outputs_(std::move(outputs)) {}

    void run() override {
        for (const auto& view : outputs_) {
            std::size_t size = view.dtype == "bool" || view.dtype.find("int8") != std::string::npos ? 1 : 2;
            for (const auto dim : view.shape) size *= static_cast<std::size_t>(dim);
            std::memset(view.data, 0, size);
        }
    }

  private:
    std::vector<TensorView> outputs_;
};

class ZeroExecutor : public Executor {
  public:
    [[nodiscard]] std::unique_ptr<BoundCall> bind(const std::string& /*graph*/,
                                                  const std::vector<TensorView>& /*inputs*/,
                                                  const std::vector<TensorView>& outputs) override {
        return std::make_unique<Zeros>(outputs);
    }
};

class ZeroBackend : public Backend {
  public:
    [[nodiscard]] std::unique_ptr<Executor> executor(std::int64_t /*batch*/) const override {
        return std::make_unique<ZeroExecutor>();
    }
};

template <class Dims>
bool is_small(const Dims& dims) {
    std::int64_t size = 1;
    for (const auto& dim : dims)
        if (const auto* number = std::get_if<std::int64_t>(&dim))
            if (__builtin_mul_overflow(size, *number, &size) || size > kSmall) return false;
    return true;
}

bool is_small(const StreamSpec& spec) {
    if (spec.vocab_size > kSmall) return false;
    for (const auto& state : spec.states)
        if (!is_small(state.shape)) return false;
    for (const auto& graph : spec.graphs)
        for (const auto* tensors : {&graph.inputs, &graph.outputs})
            for (const auto& tensor : *tensors)
                if (!is_small(tensor.shape)) return false;
    return true;
}

void walk(const StreamSpec& spec) {
    Sources sources;
    for (const auto& given : spec.inputs) sources[given.name] = [](const auto*, auto, void*) {};
    const auto batch = std::min<std::int64_t>(spec.max_batch, 2);
    Session session(std::make_shared<StreamSpec>(spec), std::make_shared<ZeroBackend>(), batch, sources);
    const std::vector<std::int64_t> tokens(static_cast<std::size_t>(batch * kTokens), 0);
    session.step(tokens);
    const auto saved = session.snapshot();
    session.reset({0});
    session.step(tokens);
    session.restore(saved);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        const auto manifest = parse_manifest({reinterpret_cast<const char*>(data), size}, "fuzzed.msc");
        if (is_small(manifest.spec)) walk(manifest.spec);
    } catch (const Error&) {
    }
    return 0;
}
