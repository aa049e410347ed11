#include "mscompile/tokenizer.hpp"

#include "files.hpp"
#include "json.hpp"
#include "mscompile/error.hpp"
#include "text.hpp"

namespace mscompile {

namespace {

constexpr std::int64_t kSizeLimit = std::int64_t{64} << 20U;

std::vector<std::string> tokens_of(const Place& place) {
    place.check_keys("Tokenizer", {"kind", "tokens"});
    if (place["kind"].json() != "char") throw place["kind"].wanted("'char'");
    std::vector<std::string> tokens;
    for (const auto& item : place["tokens"].items()) tokens.push_back(item.text());
    return tokens;
}

}  // namespace

Tokenizer::Tokenizer(std::vector<std::string> tokens) : tokens_(std::move(tokens)) {
    for (const auto& token : tokens_) {
        if (!ids_.emplace(token, static_cast<std::int64_t>(ids_.size())).second)
            throw Error(Fault::input,
                        "the vocabulary has " + in_quotes(token) + " twice; every token needs a text of its own");
    }
}

Tokenizer Tokenizer::load(const std::string& path) {
    try {
        const auto data = parse_json(read_file(path, kSizeLimit));
        return Tokenizer(tokens_of(Place(data, "tokenizer")));
    } catch (const Misfit& misfit) {
        throw Error(Fault::bundle,
                    path + " is not a tokenizer of this format: " + misfit.what() + "; export the bundle again");
    }
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text) const {
    for (std::size_t index = 0; index < tokens_.size(); ++index)
        if (characters(tokens_[index]).size() != 1)
            throw Error(Fault::input, "this vocabulary is not of single characters: token " + std::to_string(index) +
                                          " is " + in_quotes(tokens_[index]) +
                                          "; give token ids from the tokenizer that the model was trained with");
    std::vector<std::int64_t> ids;
    for (const auto& character : characters(text)) {
        const auto found = ids_.find(character);
        if (found == ids_.end())
            throw Error(Fault::input, "the vocabulary has no " + in_quotes(character) + " (position " +
                                          std::to_string(ids.size()) +
                                          " of the text); leave it out or replace it with a character that the "
                                          "model knows");
        ids.push_back(found->second);
    }
    return ids;
}

std::string Tokenizer::decode(const std::vector<std::int64_t>& ids) const {
    std::string text;
    for (const auto id : ids) {
        if (id < 0 || static_cast<std::size_t>(id) >= tokens_.size())
            throw Error(Fault::input, "token id " + std::to_string(id) +
                                          " is out of range: the vocabulary has ids 0 to " +
                                          std::to_string(static_cast<std::int64_t>(tokens_.size()) - 1));
        text += tokens_[static_cast<std::size_t>(id)];
    }
    return text;
}

}  // namespace mscompile
