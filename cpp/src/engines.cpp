#include "engines.hpp"

namespace mscompile {

const std::vector<EngineRow>& engines() {
    static const std::vector<EngineRow> kEngines = {
        {"ort", &load_onnxruntime},
#ifdef MSCOMPILE_TENSORRT
        {"trt-rtx", &load_tensorrt_rtx},
        {"trt", &load_tensorrt},
#endif
    };
    return kEngines;
}

}  // namespace mscompile
