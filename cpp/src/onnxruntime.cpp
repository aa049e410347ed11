// ONNX Runtime on the CPU, through the C interface of a library that is loaded when it is first needed.
#include <onnxruntime_c_api.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>

#include "engines.hpp"
#include "files.hpp"
#include "json.hpp"
#include "memory.hpp"
#include "shared_library.hpp"
#include "text.hpp"

namespace mscompile {

namespace {

namespace fs = std::filesystem;

// The graphs are of IR version 10, which ONNX Runtime reads since 1.18. All functions used here are older.
constexpr std::uint32_t kApiVersion = 18;
static_assert(ORT_API_VERSION >= kApiVersion, "mscompile needs the headers of ONNX Runtime 1.18 or newer");

constexpr std::int64_t kConfigLimit = std::int64_t{64} << 20U;

// Products of integer weights take activations rounded to 8 bits in blocks; in FP32 they are up to 50 times slower.
constexpr const char* kAccuracyLevel = "4";

const LibrarySearch& search() {
    static const LibrarySearch kSearch = {"ONNX Runtime",      "MSCOMPILE_ONNXRUNTIME", "onnxruntime/capi",
                                          "libonnxruntime.so", "libonnxruntime.so.1",   "onnxruntime"};
    return kSearch;
}

/// The loaded library.
struct Library {
    const OrtApi* api;
    OrtEnv* environment;
    std::string version;
};

template <class Handle>
using Owned = std::unique_ptr<Handle, void (*)(Handle*)>;

/// Turns a status of the runtime into an Error whose sentence starts with `what`.
void check(const OrtApi& api, OrtStatus* status, const std::string& what) {
    if (status == nullptr) return;
    const std::unique_ptr<OrtStatus, void (*)(OrtStatus*)> owned(status, api.ReleaseStatus);
    const std::string text = api.GetErrorMessage(status);
    throw Error(Fault::engine, what + ": " + text.substr(0, text.find('\n')));
}

Library load_library(const std::string& path) {
    // From 1.29 on, the library tells Microsoft about models and the machine, unless it starts with this set.
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
    const SharedLibrary library(path, search());
    const auto* base = library.function<const OrtApiBase*()>("OrtGetApiBase")();
    const auto* api = base->GetApi(kApiVersion);
    const std::string version = base->GetVersionString();
    if (api == nullptr)
        throw Error(Fault::unavailable, path + " is ONNX Runtime " + version + ", and 1." +
                                            std::to_string(kApiVersion) +
                                            " or newer is needed; pip install 'onnxruntime>=1.31'");
    OrtEnv* environment = nullptr;
    check(*api, api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "mscompile", &environment), "ONNX Runtime cannot start");
    return {api, environment, version};
}

/// Loaded once a process and path.
const Library& library_at(const std::string& path) {
    static std::mutex mutex;
    static auto* loaded = new std::map<std::string, Library>;  // for as long as the process lives
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = loaded->find(path);
    return found != loaded->end() ? found->second : loaded->emplace(path, load_library(path)).first->second;
}

std::string text_of(const fs::path& path) {
    const std::ifstream stream(path, std::ios::binary);
    std::ostringstream text;
    text << stream.rdbuf();
    return text.str();
}

/// The first line of the processor's features, its words sorted.
std::string processor_features() {
    std::istringstream lines(text_of("/proc/cpuinfo"));
    std::string line;
    while (std::getline(lines, line) && line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) {
    }
    std::istringstream words(line);
    std::multiset<std::string> sorted;
    for (std::string word; words >> word;) sorted.insert(word);
    return join({sorted.begin(), sorted.end()}, " ");
}

/// What packed weights depend on, as the bundle's engine.json records it under `packed_for`.
std::string packing_environment(const std::string& version) {
    utsname machine{};
    uname(&machine);
    return "onnxruntime " + version + ", " + machine.machine + ", " + sha256_of(processor_features()).substr(0, 16);
}

ONNXTensorElementDataType element_type(const std::string& dtype) {
    static const std::map<std::string, ONNXTensorElementDataType> kTypes = {
        {"bool", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL},       {"int8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8},
        {"int16", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16},     {"int32", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32},
        {"int64", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64},     {"uint8", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8},
        {"float16", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16}, {"float32", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
        {"float64", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE},
    };
    return kTypes.at(dtype);
}

class OrtCall : public BoundCall {
  public:
    OrtCall(const OrtApi& api, OrtSession* session, std::string graph)
        : api_(api), session_(session), graph_(std::move(graph)), binding_(nullptr, api.ReleaseIoBinding) {
        OrtIoBinding* binding = nullptr;
        check(api_, api_.CreateIoBinding(session, &binding), failed());
        binding_.reset(binding);
    }

    void bind(const std::vector<TensorView>& inputs, const std::vector<TensorView>& outputs) {
        OrtMemoryInfo* place = nullptr;
        check(api_, api_.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &place), failed());
        const Owned<OrtMemoryInfo> owned(place, api_.ReleaseMemoryInfo);
        for (const auto& view : inputs)
            check(api_, api_.BindInput(binding_.get(), view.name.c_str(), tensor(view, place).get()), failed());
        for (const auto& view : outputs)
            check(api_, api_.BindOutput(binding_.get(), view.name.c_str(), tensor(view, place).get()), failed());
    }

    void run() override { check(api_, api_.RunWithBinding(session_, nullptr, binding_.get()), failed()); }

  private:
    [[nodiscard]] std::string failed() const { return "ONNX Runtime failed in graph " + graph_; }

    [[nodiscard]] Owned<OrtValue> tensor(const TensorView& view, const OrtMemoryInfo* place) const {
        OrtValue* value = nullptr;
        check(
            api_,
            api_.CreateTensorWithDataAsOrtValue(place, view.data, byte_size(view.dtype, view.shape), view.shape.data(),
                                                view.shape.size(), element_type(view.dtype), &value),
            failed());
        return {value, api_.ReleaseValue};
    }

    const OrtApi& api_;
    OrtSession* session_;
    std::string graph_;
    Owned<OrtIoBinding> binding_;
};

using Graphs = std::map<std::string, Owned<OrtSession>>;

class OrtExecutor : public Executor {
  public:
    OrtExecutor(const OrtApi& api, const Graphs& graphs) : api_(api), graphs_(graphs) {}

    [[nodiscard]] std::unique_ptr<BoundCall> bind(const std::string& graph, const std::vector<TensorView>& inputs,
                                                  const std::vector<TensorView>& outputs) override {
        auto call = std::make_unique<OrtCall>(api_, graphs_.at(graph).get(), graph);
        call->bind(inputs, outputs);
        return call;
    }

  private:
    const OrtApi& api_;
    const Graphs& graphs_;
};

/// One inference session a graph.
class OrtBackend : public Backend {
  public:
    OrtBackend(const Library& library, const EngineSource& source);

    [[nodiscard]] std::unique_ptr<Executor> executor(std::int64_t /*batch*/) const override {
        return std::make_unique<OrtExecutor>(api_, sessions_);
    }

  private:
    void open(const GraphSpec& graph, const fs::path& path, const fs::path& weights, int threads);
    [[nodiscard]] Owned<OrtSessionOptions> options(const fs::path& weights, int threads) const;
    void check_interface(const GraphSpec& graph, const fs::path& path) const;
    [[nodiscard]] TensorSpec described(const OrtSession* session, std::size_t index, bool input) const;
    [[nodiscard]] std::vector<Dim> shape_of(const OrtTensorTypeAndShapeInfo* facts) const;

    const OrtApi& api_;
    OrtEnv* environment_;
    Graphs sessions_;
};

/// What the build recorded.
Json facts_of(const fs::path& path) {
    if (!fs::is_regular_file(path))
        throw Error(Fault::bundle, path.string() + " is missing: this bundle was not exported with --target ort");
    try {
        return parse_json(read_file(path, kConfigLimit));
    } catch (const Misfit& misfit) {
        throw Error(Fault::bundle, path.string() + " is damaged: " + misfit.what() + "; export the bundle again");
    }
}

OrtBackend::OrtBackend(const Library& library, const EngineSource& source)
    : api_(*library.api), environment_(library.environment) {
    const auto graphs = fs::path(source.bundle) / "graphs";
    const auto built = fs::path(source.bundle) / "engines" / "ort";
    const auto facts = facts_of(built / "engine.json");
    const bool packed = facts.is_object() && facts.contains("packed_for") &&
                        facts["packed_for"] == packing_environment(library.version);
    for (const auto& graph : source.spec.graphs) {
        const auto file = graph.name + ".onnx";
        const bool own = fs::is_regular_file(built / file);  // the engine's form of the graph
        const auto folder = packed ? built / "packed" : own ? built : graphs;
        open(graph, folder / file, packed ? folder : graphs, source.threads);
    }
}

Owned<OrtSessionOptions> OrtBackend::options(const fs::path& weights, int threads) const {
    OrtSessionOptions* created = nullptr;
    const std::string what = "ONNX Runtime cannot make options";
    check(api_, api_.CreateSessionOptions(&created), what);
    Owned<OrtSessionOptions> options(created, api_.ReleaseSessionOptions);
    check(api_, api_.SetSessionLogSeverityLevel(created, ORT_LOGGING_LEVEL_ERROR), what);
    if (threads > 0) check(api_, api_.SetIntraOpNumThreads(created, threads), what);
    const std::vector<std::pair<std::string, std::string>> entries = {
        {"session.qdq_matmulnbits_accuracy_level", kAccuracyLevel},
        // Each graph has its own threads: those that spin after a call would fight with the next graph's.
        {"session.force_spinning_stop", "1"},
        {"session.model_external_initializers_file_folder_path", weights.string()},
    };
    for (const auto& [key, value] : entries)
        check(api_, api_.AddSessionConfigEntry(created, key.c_str(), value.c_str()), what);
    return options;
}

/// A graph whose weights lie in another folder is handed over as bytes.
void OrtBackend::open(const GraphSpec& graph, const fs::path& path, const fs::path& weights, int threads) {
    const auto what = "ONNX Runtime cannot load " + path.filename().string() + " on CPUExecutionProvider";
    const auto chosen = options(weights, threads);
    OrtSession* session = nullptr;
    if (path.parent_path() == weights) {
        check(api_, api_.CreateSession(environment_, path.c_str(), chosen.get(), &session), what);
    } else {
        const auto content = text_of(path);
        check(api_, api_.CreateSessionFromArray(environment_, content.data(), content.size(), chosen.get(), &session),
              what);
    }
    sessions_.emplace(graph.name, Owned<OrtSession>(session, api_.ReleaseSession));
    check_interface(graph, path);
}

std::vector<Dim> OrtBackend::shape_of(const OrtTensorTypeAndShapeInfo* facts) const {
    const std::string what = "ONNX Runtime cannot describe a tensor";
    std::size_t rank = 0;
    check(api_, api_.GetDimensionsCount(facts, &rank), what);
    Shape sizes(rank);
    std::vector<const char*> words(rank);
    check(api_, api_.GetDimensions(facts, sizes.data(), rank), what);
    check(api_, api_.GetSymbolicDimensions(facts, words.data(), rank), what);
    std::vector<Dim> shape;
    for (std::size_t axis = 0; axis < rank; ++axis)
        shape.push_back(sizes[axis] < 0 ? Dim(std::string(words[axis])) : Dim(sizes[axis]));
    return shape;
}

/// Name and shape of an input or output; of its dtype, the name that this project gives it.
TensorSpec OrtBackend::described(const OrtSession* session, std::size_t index, bool input) const {
    const std::string what = "ONNX Runtime cannot describe a graph";
    OrtAllocator* allocator = nullptr;
    check(api_, api_.GetAllocatorWithDefaultOptions(&allocator), what);
    char* name = nullptr;
    OrtTypeInfo* type = nullptr;
    check(api_, (input ? api_.SessionGetInputName : api_.SessionGetOutputName)(session, index, allocator, &name), what);
    TensorSpec tensor;
    tensor.name = name;
    check(api_, api_.AllocatorFree(allocator, name), what);
    check(api_, (input ? api_.SessionGetInputTypeInfo : api_.SessionGetOutputTypeInfo)(session, index, &type), what);
    const Owned<OrtTypeInfo> owned(type, api_.ReleaseTypeInfo);
    const OrtTensorTypeAndShapeInfo* facts = nullptr;
    check(api_, api_.CastTypeInfoToTensorInfo(type, &facts), what);
    if (facts == nullptr) return tensor;  // no tensor
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api_, api_.GetTensorElementType(facts, &element), what);
    for (const auto* dtype : {"bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64"})
        if (element_type(dtype) == element) tensor.dtype = dtype;
    tensor.shape = shape_of(facts);
    return tensor;
}

/// The graph's inputs and outputs are those of the manifest, in any order.
void OrtBackend::check_interface(const GraphSpec& graph, const fs::path& path) const {
    const auto* session = sessions_.at(graph.name).get();
    for (const bool input : {true, false}) {
        std::size_t count = 0;
        check(api_, (input ? api_.SessionGetInputCount : api_.SessionGetOutputCount)(session, &count),
              "ONNX Runtime cannot describe a graph");
        std::map<std::string, TensorSpec> found;
        for (std::size_t i = 0; i < count; ++i) {
            auto tensor = described(session, i, input);
            found.emplace(tensor.name, tensor);
        }
        std::set<std::string> differing;
        for (const auto& tensor : input ? graph.inputs : graph.outputs) {
            const auto same = found.find(tensor.name);
            if (same == found.end() || !(same->second == tensor)) differing.insert(tensor.name);
            if (same != found.end()) found.erase(same);
        }
        for (const auto& [name, tensor] : found) differing.insert(name);
        if (!differing.empty())
            throw Error(Fault::bundle, path.filename().string() + ": " + (input ? "input" : "output") + "s " +
                                           join({differing.begin(), differing.end()}) +
                                           " are not what the manifest says");
    }
}

}  // namespace

std::string find_onnxruntime() { return SharedLibrary::find(search()); }

std::shared_ptr<const Backend> load_onnxruntime(const EngineSource& source) {
    const auto path = source.library.empty() ? find_onnxruntime() : source.library;
    return std::make_shared<OrtBackend>(library_at(path), source);
}

}  // namespace mscompile
