// TensorRT and TensorRT for RTX: one interface, two libraries. This is compiled with the headers of one of them, and
// runs the engines of that one, whose library is loaded when it is first needed.
#include <NvInferRuntime.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "cuda.hpp"
#include "engines.hpp"
#include "files.hpp"
#include "memory.hpp"
#include "shared_library.hpp"
#include "tensorrt_sidecar.hpp"
#include "text.hpp"

namespace mscompile {

namespace {

namespace fs = std::filesystem;
namespace trt = nvinfer1;

constexpr std::int64_t kEngineLimit = std::int64_t{1} << 40U;

/// Keeps the errors of the library until someone asks. It accepts one log a process.
class Log : public trt::ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity > Severity::kERROR) return;
        const std::lock_guard<std::mutex> lock(mutex_);
        errors_.emplace_back(message);
    }

    /// `what` with the errors since the last call.
    std::string refusal(const std::string& what) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto reasons = errors_.empty() ? "it gives no reason" : join(errors_, "; ");
        errors_.clear();
        return what + ": " + reasons;
    }

  private:
    std::mutex mutex_;
    std::vector<std::string> errors_;
};

Log& log_of_process() {
    static auto* log = new Log;  // for as long as the library, which is never unloaded
    return *log;
}

void accept(bool accepted, const std::string& graph, const std::string& what) {
    if (!accepted) throw Error(Fault::engine, log_of_process().refusal(graph + ": the engine refuses " + what));
}

trt::Dims dims_of(const Shape& shape) {
    trt::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), std::begin(dims.d));
    return dims;
}

Shape shape_of(const trt::Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }

/// One graph of one session.
struct Context {
    std::unique_ptr<trt::IExecutionContext> native;
    const BoundCall* bound = nullptr;  // whose tensors it has
};

class Call : public BoundCall {
  public:
    Call(CudaExecutor& executor, Context& context, std::string graph, const std::vector<TensorView>& inputs,
         const std::vector<TensorView>& outputs)
        : executor_(executor), context_(context), graph_(std::move(graph)) {
        for (const auto& view : inputs) inputs_.push_back(placed(view));
        for (const auto& view : outputs) outputs_.push_back(placed(view));
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() override {
        if (context_.bound == this) context_.bound = nullptr;
    }

    void run() override {
        if (context_.bound != this) attach();
        for (const auto& tensor : inputs_)
            if (!tensor.view.resident)
                executor_.transfer(tensor.address, tensor.view.data, tensor.size, cudaMemcpyHostToDevice);
        accept(context_.native->enqueueV3(executor_.stream()), graph_, "the call");
        bool answers = false;
        for (const auto& tensor : outputs_) {
            if (tensor.view.resident) continue;
            executor_.transfer(tensor.view.data, tensor.address, tensor.size, cudaMemcpyDeviceToHost);
            answers = true;
        }
        if (answers) executor_.wait();
    }

  private:
    struct Tensor {
        TensorView view;
        std::size_t size = 0;
        void* address = nullptr;  // on the device
    };

    /// Where a tensor lies on the device; what the host keeps gets a place there.
    Tensor placed(const TensorView& view) {
        const auto size = byte_size(view.dtype, view.shape);
        if (view.resident) return {view, size, view.data};
        staged_.emplace_back(executor_, size);
        return {view, size, staged_.back().data()};
    }

    void attach() {
        auto& native = *context_.native;
        context_.bound = nullptr;
        for (const auto& [view, size, address] : inputs_) {
            accept(native.setInputShape(view.name.c_str(), dims_of(view.shape)), graph_,
                   "shape " + shown(view.shape) + " of " + view.name);
            accept(native.setTensorAddress(view.name.c_str(), address), graph_, "the address of " + view.name);
        }
        for (const auto& [view, size, address] : outputs_) {
            const auto shape = shape_of(native.getTensorShape(view.name.c_str()));
            if (shape != view.shape)
                throw Error(Fault::engine, graph_ + ": " + view.name + " has shape " + shown(shape) +
                                               " where the spec says " + shown(view.shape));
            accept(native.setTensorAddress(view.name.c_str(), address), graph_, "the address of " + view.name);
        }
        context_.bound = this;
    }

    CudaExecutor& executor_;
    Context& context_;
    std::string graph_;
    std::vector<Tensor> inputs_;
    std::vector<Tensor> outputs_;
    std::vector<Resident> staged_;
};

using Engines = std::map<std::string, std::unique_ptr<trt::ICudaEngine>>;

/// A stream and an execution context for each graph, with profile 0, the only one.
class TensorRTExecutor : public CudaExecutor {
  public:
    explicit TensorRTExecutor(const Engines& engines) {
        for (const auto& [graph, engine] : engines) {
            auto& context = contexts_[graph];
            context.native.reset(engine->createExecutionContext());
            if (!context.native)
                throw Error(Fault::engine, log_of_process().refusal("no execution context for " + graph));
            // The first context of an engine has profile 0 by itself, those of further sessions do not.
            accept(context.native->setOptimizationProfileAsync(0, stream()), graph, "its profile");
        }
        wait();
    }
    TensorRTExecutor(const TensorRTExecutor&) = delete;
    TensorRTExecutor& operator=(const TensorRTExecutor&) = delete;
    ~TensorRTExecutor() override { cudaStreamSynchronize(stream()); }  // contexts must not go while they run

    [[nodiscard]] std::unique_ptr<BoundCall> bind(const std::string& graph, const std::vector<TensorView>& inputs,
                                                  const std::vector<TensorView>& outputs) override {
        return std::make_unique<Call>(*this, contexts_.at(graph), graph, inputs, outputs);
    }

  private:
    std::map<std::string, Context> contexts_;
};

class TensorRTBackend : public Backend {
  public:
    TensorRTBackend(std::unique_ptr<trt::IRuntime> runtime, Engines engines, std::int64_t least_batch)
        : runtime_(std::move(runtime)), engines_(std::move(engines)), least_batch_(least_batch) {}

    [[nodiscard]] std::unique_ptr<Executor> executor(std::int64_t batch) const override {
        if (batch < least_batch_)
            throw Error(Fault::input, "batch " + std::to_string(batch) + " is below this engine's least batch of " +
                                          std::to_string(least_batch_));
        return std::make_unique<TensorRTExecutor>(engines_);
    }

  private:
    std::unique_ptr<trt::IRuntime> runtime_;  // outlives its engines
    Engines engines_;
    std::int64_t least_batch_;
};

std::unique_ptr<trt::ICudaEngine> deserialized(trt::IRuntime& runtime, const fs::path& path, const GraphSpec& graph) {
    const auto content = read_file(path, kEngineLimit);
    std::unique_ptr<trt::ICudaEngine> engine(runtime.deserializeCudaEngine(content.data(), content.size()));
    const auto file = path.filename().string();
    if (!engine) throw Error(Fault::engine, log_of_process().refusal(file + " cannot be read on this GPU"));
    std::set<std::string> names;
    for (std::int32_t i = 0; i < engine->getNbIOTensors(); ++i) names.insert(engine->getIOTensorName(i));
    std::set<std::string> wanted;
    for (const auto* tensors : {&graph.inputs, &graph.outputs})
        for (const auto& tensor : *tensors) wanted.insert(tensor.name);
    if (names != wanted)
        throw Error(Fault::engine,
                    file + " is of another graph: its tensors are " + join({names.begin(), names.end()}));
    return engine;
}

std::string version_of(const SharedLibrary& library) {
    std::vector<std::string> numbers;
    for (const auto* part : {"Major", "Minor", "Patch", "Build"})
        numbers.push_back(std::to_string(
            library.function<std::int32_t()>((std::string("getInferLib") + part + "Version").c_str())()));
    return join(numbers, ".");
}

/// Throws Error (unavailable) unless the library built the engines, and is of the headers that this is compiled with.
void check_version(const SharedLibrary& library, const Sidecar& sidecar, const LibrarySearch& search) {
    const auto version = version_of(library);
    const auto major = std::to_string(NV_TENSORRT_MAJOR);
    if (version != sidecar.version)
        throw Error(Fault::unavailable, "these engines were built by " + search.title + " " + sidecar.version +
                                            " and " + version +
                                            " is installed, which does not read them: pip install '" + search.package +
                                            "==" + sidecar.version + "' or export again");
    if (version.substr(0, version.find('.')) != major)
        throw Error(Fault::unavailable, "this build of mscompile has headers of major version " + major + ", and " +
                                            library.path() + " is " + version +
                                            "; build mscompile with the headers of " + search.title + " " + version);
}

void check_gpu(const LibrarySearch& search, const std::vector<std::string>& capabilities) {
    if (const auto reason = no_gpu(); !reason.empty())
        throw Error(Fault::unavailable, search.title + " engines run on an NVIDIA GPU only: " + reason +
                                            "; the engine 'ort' runs on this machine");
    const auto here = compute_capability();
    if (std::find(capabilities.begin(), capabilities.end(), here) == capabilities.end())
        throw Error(Fault::unavailable, "this GPU is " + here + " and these engines were built for " +
                                            join(capabilities) +
                                            ": export again on this machine, or use the engine 'ort'");
}

std::shared_ptr<const Backend> load(const EngineSource& source, const char* folder, const LibrarySearch& search) {
    const auto built = fs::path(source.bundle) / "engines" / folder;
    const auto sidecar = read_sidecar(built, search.package, source.spec);
    check_gpu(search, sidecar.compute_capabilities);
    const SharedLibrary library(source.library.empty() ? SharedLibrary::find(search) : source.library, search);
    check_version(library, sidecar, search);
    const auto create = library.function<void*(void*, std::int32_t)>("createInferRuntime_INTERNAL");
    std::unique_ptr<trt::IRuntime> runtime(
        static_cast<trt::IRuntime*>(create(&log_of_process(), static_cast<std::int32_t>(NV_TENSORRT_VERSION))));
    if (!runtime) throw Error(Fault::unavailable, log_of_process().refusal(search.title + " does not start"));
    Engines engines;
    for (const auto& graph : source.spec.graphs)
        engines[graph.name] = deserialized(*runtime, built / (graph.name + ".engine"), graph);
    return std::make_shared<TensorRTBackend>(std::move(runtime), std::move(engines), sidecar.ranges.batch[0]);
}

}  // namespace

std::shared_ptr<const Backend> load_tensorrt(const EngineSource& source) {
    return load(source, "trt",
                {"TensorRT", "MSCOMPILE_TENSORRT", "tensorrt_libs", "libnvinfer.so",
                 "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR), "tensorrt"});
}

std::shared_ptr<const Backend> load_tensorrt_rtx(const EngineSource& source) {
    return load(source, "trt-rtx",
                {"TensorRT for RTX", "MSCOMPILE_TENSORRT_RTX", "tensorrt_rtx_libs", "libtensorrt_rtx.so",
                 "libtensorrt_rtx.so.1", "tensorrt-rtx"});
}

}  // namespace mscompile
