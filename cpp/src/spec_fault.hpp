// What must hold inside a StreamSpec, so that a host can follow it without looking twice.
#pragma once

#include <optional>
#include <string>

#include "mscompile/spec.hpp"

namespace mscompile {

/// The first contradiction, as part of a sentence; none if there is none.
std::optional<std::string> spec_fault(const StreamSpec& spec);

/// Why `name` cannot be part of a file name on every system.
std::optional<std::string> name_fault(const std::string& what, const std::string& name);

}  // namespace mscompile
