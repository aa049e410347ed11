// The engines of this library, in the order they are tried.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "mscompile/backend.hpp"
#include "mscompile/spec.hpp"

namespace mscompile {

/// What an engine is loaded from.
struct EngineSource {
    std::string bundle;  ///< the directory, its files checked
    const StreamSpec& spec;
    int threads;          ///< 0: as many as the runtime likes
    std::string library;  ///< empty: found by the engine
};

struct EngineRow {
    std::string name;
    std::shared_ptr<const Backend> (*load)(const EngineSource& source);
};

const std::vector<EngineRow>& engines();

/// ONNX Runtime on the CPU. Throws Error (unavailable) where its library is missing or too old.
std::shared_ptr<const Backend> load_onnxruntime(const EngineSource& source);

/// TensorRT, and TensorRT for RTX, on the current GPU; only in builds that found NVIDIA's headers. Throw Error: engine
/// for a damaged engine.json, unavailable where the GPU or the library is missing or not the one built for.
std::shared_ptr<const Backend> load_tensorrt(const EngineSource& source);
std::shared_ptr<const Backend> load_tensorrt_rtx(const EngineSource& source);

}  // namespace mscompile
