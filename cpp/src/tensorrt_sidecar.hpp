// What the directory of a TensorRT engine holds: a serialized engine for every graph, and engine.json, which says what
// they were built from and for, so that all else can be checked on any machine.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "mscompile/spec.hpp"

namespace mscompile {

/// Least, usual and greatest sizes: an engine's optimization profile.
struct Ranges {
    using Steps = std::array<std::int64_t, 3>;
    Steps batch{};
    Steps chunk{};
    Steps context{};
};

/// engine.json, checked against the spec.
struct Sidecar {
    std::string version;                            ///< of the runtime that built the engines, and reads them
    std::vector<std::string> compute_capabilities;  ///< of the GPUs that they were built for, such as "SM89"
    Ranges ranges;
};

/// Reads the sidecar in `built`. Throws Error (engine) where it, or a file beside it, is not what `runtime`, as pip
/// calls it, was asked to build for `spec`.
Sidecar read_sidecar(const std::filesystem::path& built, const std::string& runtime, const StreamSpec& spec);

}  // namespace mscompile
