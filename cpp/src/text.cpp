#include "text.hpp"

#include <charconv>
#include <cmath>

namespace mscompile {

namespace {

std::size_t length_of(std::string_view text) {
    const auto byte = static_cast<unsigned char>(text.front());
    const std::size_t length = byte < 0xC0 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
    return length <= text.size() ? length : 1;
}

std::string escaped(char letter, char quote) {
    constexpr std::string_view kHex = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(letter);
    switch (letter) {
        case '\n':
            return "\\n";
        case '\r':
            return "\\r";
        case '\t':
            return "\\t";
        case '\\':
            return "\\\\";
        default:
            if (letter == quote) return {'\\', letter};
            if (byte < 0x20 || byte == 0x7F) return {'\\', 'x', kHex[byte >> 4U], kHex[byte & 15U]};
            return {letter};
    }
}

std::string in_brackets(const std::vector<std::string>& items) {
    return "(" + join(items) + (items.size() == 1 ? ",)" : ")");
}

}  // namespace

std::vector<std::string> characters(std::string_view text) {
    std::vector<std::string> found;
    while (!text.empty()) {
        found.emplace_back(text.substr(0, length_of(text)));
        text.remove_prefix(found.back().size());
    }
    return found;
}

std::string in_quotes(std::string_view text) {
    const bool single = text.find('\'') == std::string_view::npos || text.find('"') != std::string_view::npos;
    const char quote = single ? '\'' : '"';
    std::string result(1, quote);
    for (const char letter : text) result += escaped(letter, quote);
    return result + quote;
}

std::string join(const std::vector<std::string>& words, std::string_view between) {
    std::string result;
    for (const auto& word : words) {
        if (&word != &words.front()) result += between;
        result += word;
    }
    return result;
}

std::string shown(const Dim& dim) {
    const auto* word = std::get_if<std::string>(&dim);
    return word != nullptr ? in_quotes(*word) : std::to_string(std::get<std::int64_t>(dim));
}

std::string shown(const std::vector<Dim>& shape) {
    std::vector<std::string> items;
    for (const auto& dim : shape) items.push_back(shown(dim));
    return in_brackets(items);
}

std::string shown(const Shape& shape) { return shown(std::vector<Dim>(shape.begin(), shape.end())); }

std::string shown(double number) {
    if (std::isnan(number)) return "nan";
    if (std::isinf(number)) return number > 0 ? "inf" : "-inf";
    char text[64];
    auto* const end = std::to_chars(std::begin(text), std::end(text), number).ptr;
    const std::string result(text, end);
    return result.find_first_of(".e") == std::string::npos ? result + ".0" : result;
}

}  // namespace mscompile
