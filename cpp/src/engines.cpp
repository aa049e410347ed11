#include "engines.hpp"

namespace mscompile {

const std::vector<EngineRow>& engines() {
    static const std::vector<EngineRow> kEngines = {{"ort", &load_onnxruntime}};
    return kEngines;
}

}  // namespace mscompile
