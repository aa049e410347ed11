// Text to token ids and back, for vocabularies of single characters.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace mscompile {

class Tokenizer {
  public:
    /// The text of every token, by id, in UTF-8. Throws Error where two are equal.
    explicit Tokenizer(std::vector<std::string> tokens);

    /// Reads tokenizer.json. Throws Error where it is missing or not right.
    static Tokenizer load(const std::string& path);

    /// The ids of a UTF-8 text, one a character. Throws Error naming the first character the vocabulary lacks.
    [[nodiscard]] std::vector<std::int64_t> encode(std::string_view text) const;

    /// The text of `ids`. Throws Error naming the first id that is out of range.
    [[nodiscard]] std::string decode(const std::vector<std::int64_t>& ids) const;

  private:
    std::vector<std::string> tokens_;
    std::unordered_map<std::string, std::int64_t> ids_;
};

}  // namespace mscompile
