// Text as the messages of this project show it: as Python writes values.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "mscompile/spec.hpp"

namespace mscompile {

/// The characters of a UTF-8 text; a byte that belongs to none stands alone.
std::vector<std::string> characters(std::string_view text);

/// A text in quotes, control characters escaped.
std::string in_quotes(std::string_view text);

std::string join(const std::vector<std::string>& words, std::string_view between = ", ");

std::string shown(const Dim& dim);
std::string shown(const std::vector<Dim>& shape);
std::string shown(const Shape& shape);

/// The shortest text that reads back as `number`.
std::string shown(double number);

}  // namespace mscompile
